"""A unit of text -> a part: cleaned, encoded, with what merging needs to know of each document.

This is what the processes of prepare run. It imports neither torch nor Megatron-core, so that they start at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from largeformer.data.cleaning import Cleaned, Cleaner
from largeformer.data.deduplication import MinHasher, text_digest
from largeformer.data.indexed_writer import id_dtype
from largeformer.data.parts import Notes, write_part
from largeformer.data.text import Document, Rejected, read_block
from largeformer.data.tokenizer import Tokenizer
from largeformer.data.units import Unit

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
        made = _Documents()
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
        ids = self.tokenizer.encode_array(text)
        end = np.array([self.tokenizer.eod], dtype=ids.dtype)
        made.ids += [ids, end]
        made.lengths.append(len(ids) + 1)
        made.sizes.append(len(text.encode("utf-8")))
        made.unknown.append(int(np.count_nonzero(ids == self.tokenizer.unknown)))
        if self.exact:
            made.digests.append(text_digest(text))
        if self.hasher is not None:
            made.signatures.append(self.hasher.signature(text))


@dataclass
class _Documents:
    """The documents of a unit so far."""

    ids: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    signatures: list[np.ndarray] = field(default_factory=list)

    def arrays(self, dtype: np.dtype) -> dict[str, np.ndarray]:
        ids = np.concatenate(self.ids) if self.ids else np.empty(0, dtype=np.int32)
        assert not ids.size or (ids.min() >= 0 and ids.max() <= np.iinfo(dtype).max)
        return {
            "ids": ids.astype(dtype),
            **{name: np.array(getattr(self, name), dtype=np.int32) for name in ("lengths", "sizes", "unknown")},
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
    kind = {"changed": list(cleaned.changed), "dropped": cleaned.dropped}
    if not any({name: sample[name] for name in kind} == kind for sample in notes.samples):
        notes.samples.append(_sample(document, cleaned, kind))


def _sample(document: Document, cleaned: Cleaned, kind: dict[str, Any]) -> dict[str, Any]:
    before, after = document.text, cleaned.text or ""
    # Begin shortly before the first difference, so that a sample of a long document shows one.
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0) if cleaned.changed else 0
    start = max(0, same - _SAMPLE_CHARACTERS // 3)
    shown = slice(start, start + _SAMPLE_CHARACTERS)
    cut = {"before": before[shown], "after": after[shown] if cleaned.text is not None else None}
    return {**kind, "file": document.file, "line": document.line, "start": start, "characters": len(before), **cut}
