"""`metrics.jsonl` and `events.jsonl`: the run's own record, one JSON object a line.

A line is with the operating system when `write` returns, so that a killed process loses none. JSON knows no NaN: a number that
is not finite becomes null, and the object's key "nonfinite" says what it was.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from largeformer.tracking.tracker import Row, Tracker


class JsonLines:
    """A file that grows by whole lines. Where a write fails half-way (full disk), the half line is taken back."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line. Raises OSError where the disk refuses it, TypeError for a value that JSON does not know."""
        line = encode(record).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()


class JsonlTracker(Tracker):
    """Rows go to `metrics.jsonl`; events and samples of text to `events.jsonl`, each with its step and time."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        metrics, events = folder / "metrics.jsonl", folder / "events.jsonl"
        # A fresh start repeats step 0 too (a first validation, say), while a resumed one has behind it all that its checkpoint's step had.
        last = resume_step if resume_step > 0 else -1
        for path in (metrics, events):
            cut_after(path, last)
        self._metrics, self._events = JsonLines(metrics), JsonLines(events)

    def log(self, row: Row) -> None:
        self._metrics.write(row)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._events.write({"event": kind, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds"), **fields})

    def sample(self, step: int, prompt: str, text: str) -> None:
        self.event("sample", step, prompt=prompt, text=text)

    def close(self, status: str) -> None:
        self._metrics.close()
        self._events.close()


def encode(record: Mapping[str, Any]) -> str:
    """One line of valid JSON, floats in full precision."""
    found: dict[str, str] = {}
    clean = {key: _finite(value, key, found) for key, value in record.items()}
    if found:
        clean["nonfinite"] = found
    return json.dumps(clean, ensure_ascii=False, allow_nan=False)


def _finite(value: Any, where: str, found: dict[str, str]) -> Any:
    """`value` with None for each float that is not finite; `found` takes its place, as `key.inner.0`, and its name."""
    if isinstance(value, float) and not math.isfinite(value):
        found[where] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner, f"{where}.{key}", found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, f"{where}.{i}", found) for i, inner in enumerate(value)]
    return value


def cut_after(path: Path, step: int) -> None:
    """Drops the lines after `step`, and those that are no row at all, such as one half-written. The file is replaced whole or not at
    all; one that needs no cut is not touched, and one that is not there is no error."""
    if not path.exists():
        return
    shorter = path.with_name(path.name + ".tmp")
    dropped = 0
    with path.open("rb") as lines, shorter.open("wb") as kept:
        for line in lines:
            if _belongs(line, step):
                kept.write(line)
            else:
                dropped += 1
        kept.flush()
        os.fsync(kept.fileno())
    if dropped:
        os.replace(shorter, path)
    else:
        shorter.unlink()


def _belongs(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
