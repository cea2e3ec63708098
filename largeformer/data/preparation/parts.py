"""What one unit of work comes to: a file `part-000000.npz`, complete or not there. `n` documents, `t` tokens.

ids        uint16 or int32 [t]   every document with its end
lengths    int32 [n]             tokens of each
sizes      int32 [n]             bytes of each as UTF-8, after cleaning
unknown    int32 [n]             unknown tokens of each
digests    uint8 [n, 16]         for exact deduplication, else [0, 16]
signatures [n, permutations]     for near-deduplication, else [0, 0]
notes      JSON                  where the unit ends, what was rejected, dropped and changed, samples before and after
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from largeformer.artifact import commit
from largeformer.data.reading.text import Rejected
from largeformer.data.reading.units import Cursor


@dataclass
class Notes:
    """What is told of a unit beside its tokens. read: documents before cleaning. input_bytes, text_bytes: for the progress bar."""

    end: dict[str, int]
    input_bytes: int = 0
    text_bytes: int = 0
    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    rejected: list[tuple[str, int, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def cursor(self) -> Cursor:
        return Cursor(**self.end)

    def reject(self, item: Rejected) -> None:
        self.rejected.append((item.file, item.line, item.reason))


class Part:
    """A finished part. Its arrays are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self._file = np.load(path, allow_pickle=False)

    @cached_property
    def notes(self) -> Notes:
        return Notes(**json.loads(self._file["notes"].tobytes()))

    def array(self, name: str) -> np.ndarray:
        return np.asarray(self._file[name])

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_part(folder: Path, number: int, notes: Notes, arrays: dict[str, np.ndarray]) -> None:
    content = np.frombuffer(json.dumps(asdict(notes)).encode(), dtype=np.uint8)
    descriptor, temporary = tempfile.mkstemp(prefix=".part-", suffix=".tmp", dir=folder)
    with open(descriptor, "wb") as handle:
        np.savez(handle, notes=content, **arrays)  # type: ignore[arg-type]
    commit(Path(temporary), part_path(folder, number))


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06}.npz"


def parts(folder: Path) -> Iterator[Part]:
    """The parts of one source from the first to the first that is not there, one open at a time."""
    number = 0
    while (path := part_path(folder, number)).exists():
        with Part(path) as part:
            yield part
        number += 1


def finished(folder: Path) -> tuple[int, Notes | None]:
    """How many parts lie there without a gap, and the last one's notes."""
    number = 0
    while part_path(folder, number).exists():
        number += 1
    if number == 0:
        return 0, None
    with Part(part_path(folder, number - 1)) as last:
        return number, last.notes
