"""Which of many documents are the first of their text, by 16-byte digests, in little memory.

Digests wait on disk in 256 files, told apart by their first byte, until all are there; then each file is sorted alone. A digest costs
24 bytes of disk and about a quarter of a byte of memory: 250 MB for a billion documents.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

_BUCKETS = 256
_HELD = 2**16
_ENTRY = np.dtype([("low", "<u8"), ("high", "<u8"), ("number", "<u8")])


class FirstOfEqual:
    """Feed every document's digest in order with `add`; after `finish`, `is_first` says which to keep.

    `folder` is filled with files, and theirs to delete; it must be empty.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._waiting: list[np.ndarray] = []
        self._held = self._count = 0

    def add(self, digests: np.ndarray) -> None:
        """uint8[n, 16]: the digests of the next n documents."""
        entries = np.empty(len(digests), dtype=_ENTRY)
        halves = np.ascontiguousarray(digests).view("<u8")
        entries["low"], entries["high"] = halves[:, 0], halves[:, 1]
        entries["number"] = np.arange(self._count, self._count + len(digests))
        self._waiting.append(entries)
        self._count += len(digests)
        self._held += len(digests)
        if self._held >= _HELD:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._first = np.memmap(self._folder / "first", dtype=bool, mode="w+", shape=(max(self._count, 1),))
        self._first[:] = True
        for bucket in self._folder.glob("*.digests"):
            entries = np.fromfile(bucket, dtype=_ENTRY)
            entries = entries[np.lexsort((entries["number"], entries["high"], entries["low"]))]
            again = (entries["low"][1:] == entries["low"][:-1]) & (entries["high"][1:] == entries["high"][:-1])
            self._first[entries["number"][1:][again]] = False
            bucket.unlink()

    def is_first(self, start: int, count: int) -> np.ndarray:
        """bool[count]: whether each of the documents from number `start` on is the first of its text."""
        return np.array(self._first[start : start + count])

    def _flush(self) -> None:
        if not self._held:
            return
        entries = np.concatenate(self._waiting)
        bucket = (entries["low"] & 0xFF).astype(np.uint8)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=_BUCKETS))
        for number, part in enumerate(np.split(entries[order], ends[:-1])):
            if len(part):
                with (self._folder / f"{number:02x}.digests").open("ab") as handle:
                    part.tofile(handle)
        self._waiting, self._held = [], 0
