"""`metrics.jsonl` and `events.jsonl`: whole lines, valid JSON, cut where a run resumes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from largeformer.tracking.jsonl import JsonLines, JsonlTracker, cut_after, encode


def read(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_rows_events_and_samples_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, resume_step=0)
    tracker.log({"step": 1, "loss": 8.317766166719343, "loss_scale": None})
    tracker.event("saved", 1, path="checkpoints/step_00000001")
    tracker.sample(1, "def main(", "):\n\tpass \u2603")
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 8.317766166719343, "loss_scale": None}]
    saved, sample = read(tmp_path / "events.jsonl")
    assert (saved["event"], saved["step"], saved["path"]) == ("saved", 1, "checkpoints/step_00000001")
    assert (sample["event"], sample["prompt"], sample["text"]) == ("sample", "def main(", "):\n\tpass \u2603")
    assert saved["time"].endswith("+00:00")
    tracker.close("finished")


# record -> what its line says
ENCODED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "finite": ({"step": 1, "loss": 0.1}, {"step": 1, "loss": 0.1}),
    "NaN": ({"step": 1, "loss": math.nan}, {"step": 1, "loss": None, "nonfinite": {"loss": "NaN"}}),
    "infinities": (
        {"step": 1, "loss": math.inf, "grad_norm": -math.inf},
        {"step": 1, "loss": None, "grad_norm": None, "nonfinite": {"loss": "Infinity", "grad_norm": "-Infinity"}},
    ),
    "inside": (
        {"step": 1, "losses": [1.0, math.nan], "by": {"rank": math.inf}},
        {"step": 1, "losses": [1.0, None], "by": {"rank": None}, "nonfinite": {"losses.1": "NaN", "by.rank": "Infinity"}},
    ),
}


@pytest.mark.parametrize("name", ENCODED)
def test_every_line_is_valid_json(name: str) -> None:
    record, wanted = ENCODED[name]
    assert json.loads(encode(record), parse_constant=pytest.fail) == wanted


def rows(*steps: int) -> bytes:
    return b"".join(b'{"step": %d}\n' % step for step in steps)


# name -> file before, step, file after
CUTS: dict[str, tuple[bytes, int, bytes]] = {
    "rows after the step": (rows(1, 2, 3, 4), 2, rows(1, 2)),
    "nothing to cut": (rows(1, 2), 5, rows(1, 2)),
    "all of them": (rows(0, 1), -1, b""),
    "several rows of one step": (rows(1, 2, 2, 3), 2, rows(1, 2, 2)),
    "a line half written": (rows(1, 2) + b'{"step": 2, "lo', 2, rows(1, 2)),
    "a whole object without its line end": (rows(1) + b'{"step": 2}', 2, rows(1)),
    "a torn line that a later process wrote behind": (rows(1) + b'{"st{"step": 2}\n' + rows(3), 3, rows(1, 3)),
    "zeros that a crashed machine left": (rows(1) + b"\0\0\0\0\n", 3, rows(1)),
    "a line that is no row": (rows(1) + b"[1]\n" + b'{"loss": 1}\n', 3, rows(1)),
    "empty": (b"", 3, b""),
}


@pytest.mark.parametrize("name", CUTS)
def test_resuming_cuts(name: str, tmp_path: Path) -> None:
    before, step, after = CUTS[name]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    inode = path.stat().st_ino
    cut_after(path, step)
    assert path.read_bytes() == after
    assert (path.stat().st_ino == inode) == (before == after), "a file is replaced where it is cut, and only there"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cut_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(rows(1, 2, 3))

    def fail(source: object, target: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed here"):
        cut_after(path, 1)
    assert path.read_bytes() == rows(1, 2, 3)


@pytest.mark.parametrize(("resume_step", "kept"), [(0, []), (2, [0, 1, 2])], ids=["a fresh start", "resumed at 2"])
def test_a_tracker_goes_on_behind_the_cut(resume_step: int, kept: list[int], tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).write_bytes(rows(0, 1, 2, 3))
    tracker = JsonlTracker(tmp_path, resume_step)
    tracker.log({"step": resume_step + 1})
    tracker.event("resumed", resume_step)
    tracker.close("finished")
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [*kept, resume_step + 1]
    assert [row["step"] for row in read(tmp_path / "events.jsonl")] == [*kept, resume_step]


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Within, no file of this process may grow beyond `limit` bytes, as on a full disk (EFBIG in place of ENOSPC). Not a fixture:
    pytest itself writes to a file before it tears one down."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_whole_lines_and_lets_later_ones_through(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write({"step": 1})
    with small_files(1000), pytest.raises(OSError):
        lines.write({"step": 2, "text": "x" * 1000})
    lines.write({"step": 3})
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 3]
