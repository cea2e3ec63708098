"""A disk that is really full: a file system of a few megabytes in memory. It needs the right to mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from largeformer.checkpoint.commit import SaveError
from largeformer.checkpoint.verify import checkpoint_problems, find
from tests.checkpoint.test_saving import Events, checkpoints_of, recipe_of, steps, train
from tests.distributed import RankContext, RankPool
from tests.training.engines import bench_of

Ranks = Callable[[int], RankPool]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """4 MiB: room for one checkpoint of the tiny model, not for three."""
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(tmp_path)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def save_until_full(ranks: RankContext, folder: Path, async_save: bool) -> tuple[list[tuple[str, int]], list[str], str]:
    events = Events()
    with bench_of(ranks, recipe_of()) as bench:
        checkpoints = checkpoints_of(bench, folder, events, async_save)
        for step in range(1, 7):
            checkpoints.save(train(bench, step))
            checkpoints._complete()
        with pytest.raises(SaveError) as caught:
            checkpoints.finish()
    return events.told, events.reasons, str(caught.value)


@pytest.mark.parametrize("async_save", [False, True], ids=["synchronous", "asynchronous"])
def test_a_full_disk(ranks: Ranks, small_disk: Path, async_save: bool) -> None:
    """Saves go on until there is no room; then each is refused, on both ranks alike, and what was saved stays valid."""
    first, second = ranks(2).run(save_until_full, small_disk, async_save)
    assert first == second
    told, reasons, raised = first
    saved = [step for kind, step in told if kind == "saved"]
    assert saved == list(range(1, len(saved) + 1)) and 1 <= len(saved) < 6
    assert told[len(saved) :] == [("checkpoint failed", step) for step in range(len(saved) + 1, 7)]
    assert all("No space left on device" in reason for reason in (*reasons, raised))
    assert steps(small_disk) == saved
    assert [problem for step in saved for problem in checkpoint_problems(small_disk / f"step_{step:08d}")] == []
    assert find(small_disk).checkpoint.name == f"step_{saved[-1]:08d}"
    assert not list(small_disk.glob("*.tmp"))
