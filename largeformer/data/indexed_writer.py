"""Writing Megatron-core's indexed dataset without holding its index: the same bytes that its own builder writes.

`.bin`: the ids of all documents. `.idx`: "MMIDIDX", version 1, code of the dtype, number of documents and of their borders; then the
length (int32) of each, its byte in the `.bin` (int64), and the borders (int64) 0, 1, 2, ..., since a document is one sequence.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from largeformer.artifact import commit

IDX_HEADER = 34
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_COPIED = 2**22


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def id_dtype(vocab_size: int) -> np.dtype:
    """uint16 for a vocabulary below 65,500, else int32: Megatron-core's `DType.optimal_dtype`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass
class Counts:
    """What went into one pair. `bytes` is UTF-8 text; `tokens` counts the end of each document too."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    unknown: int = 0


class IndexedWriter:
    """Writes `<prefix>.bin/.idx`. The pair has its names only after a clean end of the `with` block: never half of it.

    Lengths wait in a file beside it, so that memory does not grow with the number of documents.
    """

    def __init__(self, prefix: Path, vocab_size: int, eod: int) -> None:
        self.prefix, self.vocab_size, self.eod = prefix, vocab_size, eod
        self.counts = Counts()
        self.dtype = id_dtype(vocab_size)
        self._temporary = [path.with_suffix(path.suffix + ".tmp") for path in (bin_path(prefix), idx_path(prefix))]
        self._lengths_path = prefix.with_name(prefix.name + ".lengths.tmp")
        self._bin = self._temporary[0].open("wb")
        self._lengths = self._lengths_path.open("wb+")

    def add(self, ids: Iterable[int]) -> None:
        """Add one document; its end is marked here."""
        document = np.append(np.fromiter(ids, dtype=np.int64), self.eod)
        assert document.min() >= 0 and document.max() < self.vocab_size
        self.add_all(document.astype(self.dtype), np.array([document.size], dtype=np.int32))

    def add_all(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents that are already joined, each with its end. ids: dtype[sum of lengths], lengths: int32[documents]."""
        assert ids.dtype == self.dtype and lengths.dtype == np.int32
        ids.tofile(self._bin)
        self._lengths.write(lengths.tobytes())
        self.counts.documents += lengths.size
        self.counts.tokens += ids.size

    def copy(self, prefix: Path, documents: int, tokens: int) -> None:
        """Add the first `documents` documents, of `tokens` ids, of another pair of the same dtype."""
        with bin_path(prefix).open("rb") as source:
            copy_bytes(source, self._bin, tokens * self.dtype.itemsize)
        with idx_path(prefix).open("rb") as source:
            source.seek(IDX_HEADER)
            copy_bytes(source, self._lengths, documents * 4)
        self.counts.documents += documents
        self.counts.tokens += tokens

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._bin.close()
            if error is None:
                self._write_index()
                commit(self._temporary[0], bin_path(self.prefix))
                commit(self._temporary[1], idx_path(self.prefix))
        finally:
            self._lengths.close()
            for path in (*self._temporary, self._lengths_path):
                path.unlink(missing_ok=True)

    def _write_index(self) -> None:
        documents = self.counts.documents
        with self._temporary[1].open("wb") as index:
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, _DTYPE_CODES[self.dtype.name], documents, documents + 1))
            self._lengths.seek(0)
            copy_bytes(self._lengths, index, documents * 4)
            self._lengths.seek(0)
            start = 0
            while lengths := self._lengths.read(_COPIED):
                sizes = np.frombuffer(lengths, dtype=np.int32).astype(np.int64) * self.dtype.itemsize
                ends = start + np.cumsum(sizes)
                index.write((ends - sizes).tobytes())
                start = int(ends[-1])
            for first in range(0, documents + 1, _COPIED // 8):
                index.write(np.arange(first, min(first + _COPIED // 8, documents + 1), dtype=np.int64).tobytes())


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int) -> None:
    """Copy `size` bytes between open files, in blocks."""
    while size:
        block = source.read(min(size, _COPIED))
        assert block, "the file is shorter than its index says"
        target.write(block)
        size -= len(block)
