"""Kills prepare at random points and runs it again: `python -m tests.stages.interruptions FOLDER`, one JSON object on stdout.

A point is the n-th time that the process opens, renames, makes or removes something in its run folder, drawn evenly over all of an
uninterrupted run. There the whole process group is killed by SIGKILL. Every run is a fork of this process, so that the libraries are
imported once.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink"}


def recipe(folder: Path, sources: list[str], workers: int) -> Any:
    from tests.recipes import tiny_recipe

    data = {
        "sources": [{"path": str(folder / name)} for name in sources],
        "split": "80,10,10",
        "prepare_workers": workers,
        "cleaning": ["whitespace", "placeholders"],
        "deduplicate": {"exact": True, "near": {"permutations": 16}},
        "quarantine_threshold": 0.5,
    }
    return tiny_recipe(run={"output_dir": str(folder / "out")}, data=data, tokenizer={"vocab_size": 330})


def write_sources(folder: Path) -> None:
    draw = random.Random(3)
    words = ["quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "http://a.b/c", "42", "犬"]
    for name in ("a.jsonl", "b.txt", "c.jsonl"):
        lines = []
        for i in range(60):
            text = " ".join(draw.choices(words, k=60))
            lines += [text, ""] if name.endswith("txt") else ['{"broken', json.dumps({"text": text})][i % 10 == 0 :]
        lines += lines[:6]
        (folder / name).write_text("\n".join(lines) + "\n")


def in_a_fork(work: Callable[[], object], kill_at: int | None, counts: Path | None = None) -> bool:
    """Run `work` in a process group of its own, killed at the n-th event. Whether it came to its end."""
    child = os.fork()
    if child == 0:
        os.setsid()
        seen = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in _EVENTS and "/out" in str(arguments[0]):
                seen += 1
                if seen == kill_at:
                    os.killpg(0, signal.SIGKILL)

        sys.addaudithook(hook)
        sys.stdout = sys.stderr
        try:
            work()
            if counts is not None:
                counts.write_text(str(seen))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def trial(folder: Path, before: Path | None, work: Callable[[], object], kills: int, seed: int) -> dict[str, Any]:
    """`kills` runs killed at a random point and then run again, against one that is not. `before` is what stands there first."""
    out, counts = folder / "out", folder / "counts"

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if before is not None:
            shutil.copytree(before, out, symlinks=True)

    reset()
    assert in_a_fork(work, None, counts)
    whole, events = contents(out / "prepare"), int(counts.read_text())
    draw = random.Random(seed)
    different, reached = [], 0
    for _ in range(kills):
        reset()
        point = draw.randint(1, events)
        reached += not in_a_fork(work, point)
        ended = in_a_fork(work, None)
        found = contents(out / "prepare")
        wrong = [name for name in {**whole, **found} if whole.get(name) != found.get(name)]
        different += [f"point {point} of {events}: {wrong or 'not finished'}"] if wrong or not ended else []
    return {"events": events, "killed": reached, "different": different, "files": sorted(whole)}


def main(folder: Path) -> None:
    # Not at the top: the processes of prepare import this file.
    from largeformer.data.reading import units
    from largeformer.stages import prepare, prepare_folder

    units._SMALLEST = 2048  # type: ignore[misc]
    prepare_folder._ALONE_BYTES = 0  # type: ignore[misc]
    write_sources(folder)
    first, all_three = ["a.jsonl", "b.txt"], ["a.jsonl", "b.txt", "c.jsonl"]
    found = {
        "alone": trial(folder, None, lambda: prepare.run(recipe(folder, first, 1)), 5, seed=1),
        "two workers": trial(folder, None, lambda: prepare.run(recipe(folder, first, 2)), 2, seed=2),
    }
    shutil.rmtree(folder / "out")
    assert in_a_fork(lambda: prepare.run(recipe(folder, first, 1)), None)
    shutil.copytree(folder / "out", folder / "base")
    found["append"] = trial(folder, folder / "base", lambda: prepare.run(recipe(folder, all_three, 1), append=True), 4, seed=3)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
