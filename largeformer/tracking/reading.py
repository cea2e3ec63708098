"""Reads `metrics.jsonl` and `events.jsonl` back, as far as they are whole."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lines:
    """The records of a file in order, and the numbers of the lines that are none (from 1), such as one half-written."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)


def read_lines(path: Path) -> Lines:
    """Every whole record of `path`: a JSON object, without NaN, with a whole number "step". A file that is not there has none."""
    lines = Lines()
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return lines
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            record = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            lines.rows.append(record)
        else:
            lines.broken.append(number)
    return lines


def _no_constant(name: str) -> None:
    raise ValueError(f"JSON knows no {name}")


def last_pass(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows`, all of one kind, without what was done over: where the step falls back, what had been logged from there on is left out."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            kept.pop()
        kept.append(row)
    return kept
