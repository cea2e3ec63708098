"""A unit of text -> a part: cleaned, encoded, with what merging needs to know of each document.

This is what the processes of prepare run. It imports neither torch nor Megatron-core, so that they start at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from largeformer.data.cleaning.cleaner import Cleaned, Cleaner
from largeformer.data.cleaning.deduplication import MinHasher, text_digest
from largeformer.data.indexed_writer import id_dtype
from largeformer.data.preparation.parts import Notes, write_part
from largeformer.data.reading.text import Document, Rejected, read_block
from largeformer.data.reading.units import Unit
from largeformer.data.tokenization.tokenizer import Tokenizer

DIGEST_BYTES = 16
_SAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Task:
    """One unit, the field of its text, and the folder of its part."""

    unit: Unit
    text_key: str
    folder: Path


@dataclass(frozen=True)
class Encoder:
    """Does the work of one task. A value: every process has its copy."""

    tokenizer: Tokenizer
    cleaner: Cleaner
    max_document_bytes: int
    exact: bool = False
    hasher: MinHasher | None = None

    def __call__(self, task: Task) -> tuple[int, int]:
        """Write the part. Returns the bytes that were read of the files, and the bytes of text in them."""
        notes = Notes(asdict(task.unit.end), input_bytes=task.unit.input_bytes)
        made = _Documents(self.tokenizer.eod, self.tokenizer.unknown)
        for document in self._documents(task, notes):
            cleaned = self.cleaner(document.text)
            _note(notes, document, cleaned)
            if cleaned.text is not None:
                self._encode(cleaned.text, made)
        write_part(task.folder, task.unit.number, notes, made.arrays(id_dtype(self.tokenizer.vocab_size)))
        return notes.input_bytes, notes.text_bytes

    def _documents(self, task: Task, notes: Notes) -> Iterator[Document]:
        for item in task.unit.items:
            if isinstance(item, Rejected):
                notes.reject(item)
                continue
            notes.text_bytes += len(item.content)
            for found in read_block(item, task.text_key, self.max_document_bytes):
                if isinstance(found, Rejected):
                    notes.reject(found)
                else:
                    yield found

    def _encode(self, text: str, made: _Documents) -> None:
        made.ids.append(self.tokenizer.encode_array(text))
        made.sizes.append(len(text.encode("utf-8")))
        if self.exact:
            made.digests.append(text_digest(text))
        if self.hasher is not None:
            made.signatures.append(self.hasher.signature(text))


@dataclass
class _Documents:
    """The documents of a unit so far; `ids` without their ends."""

    eod: int
    unknown: int
    ids: list[np.ndarray] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)

    def arrays(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        lengths = np.array([len(ids) + 1 for ids in self.ids], dtype=np.int32)
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        end = np.array([self.eod], dtype=np.int32)
        ids = np.concatenate([part for document in self.ids for part in (document, end)] or [end[:0]])
        assert not ids.size or (ids.min() >= 0 and ids.max() <= np.iinfo(dtype).max)
        return {
            "ids": ids.astype(dtype),
            "lengths": lengths,
            "sizes": np.array(self.sizes, dtype=np.int32),
            "unknown": np.add.reduceat(ids == self.unknown, starts, dtype=np.int32) if ids.size else lengths,
            "digests": np.frombuffer(b"".join(self.digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
            "signatures": np.stack(self.signatures) if self.signatures else np.empty((0, 0), dtype=np.uint32),
        }


def _note(notes: Notes, document: Document, cleaned: Cleaned) -> None:
    """Count what cleaning did, and keep the first document of each kind of change as a sample."""
    notes.read += 1
    for step in cleaned.changed:
        notes.changed[step] = notes.changed.get(step, 0) + 1
    if cleaned.dropped is not None:
        notes.dropped[cleaned.dropped] = notes.dropped.get(cleaned.dropped, 0) + 1
    kind = (cleaned.changed, cleaned.dropped)
    if kind not in [(tuple(sample["changed"]), sample["dropped"]) for sample in notes.samples]:
        notes.samples.append(_sample(document, cleaned))


def _sample(document: Document, cleaned: Cleaned) -> dict[str, Any]:
    before, after = document.text, cleaned.text or ""
    # Begin shortly before the first difference, so that a sample of a long document shows one.
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0) if cleaned.changed else 0
    start = max(0, same - _SAMPLE_CHARACTERS // 3)
    shown = slice(start, start + _SAMPLE_CHARACTERS)
    cut = {"before": before[shown], "after": after[shown] if cleaned.text is not None else None}
    kind = {"changed": list(cleaned.changed), "dropped": cleaned.dropped}
    return {**kind, "file": document.file, "line": document.line, "start": start, "characters": len(before), **cut}
