"""The parts of all sources -> one `.bin/.idx` pair each, in order, without duplicates.

Two passes over the parts: the first gathers what was counted and rejected, and finds equal documents; the second writes what
stays. Both may be done again after an interruption: they read the parts, and write below a folder of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from largeformer.artifact import commit
from largeformer.config.cleaning import DeduplicateConfig
from largeformer.data.cleaning.deduplication import NearDuplicates
from largeformer.data.indexed_writer import IndexedWriter, copy_bytes
from largeformer.data.preparation.duplicates import FirstOfEqual
from largeformer.data.preparation.encoding import DIGEST_BYTES
from largeformer.data.preparation.parts import Part, parts
from largeformer.data.preparation.statistics import SourceStatistics, Statistics

QUARANTINE = "quarantine.jsonl"
FINGERPRINTS = "deduplication"
_READ_DOCUMENTS = 2**14


@dataclass(frozen=True)
class Base:
    """What a finished prepare holds of a source, to which documents are added."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class Merged:
    """One source of text: its pair's name, the folder of its parts, and what is there already."""

    name: str
    parts: Path
    base: Base


@dataclass(frozen=True)
class Merger:
    """there: the folder of what is already prepared. out: an empty folder, filled with what replaces or adds to it. work: an empty folder.

    signature: dtype and size of a MinHash signature.
    """

    sources: Sequence[Merged]
    there: Path
    out: Path
    work: Path
    vocab_size: int
    eod: int
    deduplicate: DeduplicateConfig | None
    signature: tuple[np.dtype, int]

    def survey(self, statistics: dict[str, SourceStatistics], total: Statistics, kept_quarantine: int) -> FirstOfEqual | None:
        """Add what the parts tell to `statistics` (by the source's name), write the quarantine, and find equal documents.

        kept_quarantine: bytes of the quarantine that is there, which the new one begins with.
        """
        first = FirstOfEqual(self.work / "digests") if self.deduplicate is not None and self.deduplicate.exact else None
        if first is not None:
            for source in self.sources:
                for digests in self._known(source, "digests", np.dtype(np.uint8), DIGEST_BYTES):
                    first.add(digests)
        temporary = self.out / f"{QUARANTINE}.tmp"
        with temporary.open("wb") as quarantine:
            if kept_quarantine:
                with (self.there / QUARANTINE).open("rb") as before:
                    copy_bytes(before, quarantine, kept_quarantine)
            for source in self.sources:
                for part in parts(source.parts):
                    statistics[source.name].note(part.notes)
                    total.sample(part.notes)
                    quarantine.writelines(_row(*rejected) for rejected in part.notes.rejected)
                    if first is not None:
                        first.add(part.array("digests"))
        commit(temporary, self.out / QUARANTINE)
        if first is not None:
            first.finish()
        return first

    def write(self, first: FirstOfEqual | None, statistics: dict[str, SourceStatistics]) -> None:
        """Write the pairs of all sources that have parts, and what a later prepare needs to find duplicates of theirs."""
        near = NearDuplicates(self.deduplicate.near) if self.deduplicate is not None and self.deduplicate.near is not None else None
        if near is not None:
            for source in self.sources:
                for signatures in self._known(source, "signatures", *self.signature):
                    for signature in signatures:
                        near.first_seen(signature)
        number = sum(source.base.documents for source in self.sources)
        for source in self.sources:
            number = self._write_source(source, first, near, number, statistics[source.name])

    def _write_source(
        self, source: Merged, first: FirstOfEqual | None, near: NearDuplicates | None, number: int, statistics: SourceStatistics
    ) -> int:
        """Write one pair; `number` is that of its first new document. Returns that of the next source's."""
        if next(parts(source.parts), None) is None:
            return number
        prefix = self.out / source.name
        with IndexedWriter(prefix, self.vocab_size, self.eod) as writer, _Fingerprints(self, source, first, near) as fingerprints:
            if source.base.documents:
                writer.copy(self.there / source.name, source.base.documents, source.base.tokens)
            for part in parts(source.parts):
                lengths = part.array("lengths")
                keep = np.ones(len(lengths), dtype=bool)
                if first is not None:
                    keep = first.is_first(number, len(lengths))
                    statistics.drop("duplicate", int((~keep).sum()))
                number += len(lengths)
                if near is not None:
                    similar = _similar(near, part.array("signatures"), keep)
                    statistics.drop("near-duplicate", int(similar.sum()))
                    keep &= ~similar
                _add(writer, part, lengths, keep)
                fingerprints.add(part, keep)
                statistics.keep(lengths[keep], *(int(part.array(name)[keep].sum(dtype=np.int64)) for name in ("sizes", "unknown")))
        return number

    def _known(self, source: Merged, kind: str, dtype: np.dtype, size: int) -> Iterator[np.ndarray]:
        """The fingerprints of a source's documents that are there already, some thousand at a time."""
        left = source.base.documents
        if not left:
            return
        with (self.there / FINGERPRINTS / f"{source.name}.{kind}").open("rb") as handle:
            while left:
                count = min(left, _READ_DOCUMENTS)
                yield np.frombuffer(handle.read(count * size * dtype.itemsize), dtype=dtype).reshape(count, size)
                left -= count


class _Fingerprints:
    """Digests and signatures of the documents kept, beside the pair: what a later prepare finds duplicates by."""

    def __init__(self, merger: Merger, source: Merged, first: FirstOfEqual | None, near: NearDuplicates | None) -> None:
        self._handles: dict[str, BinaryIO] = {}
        known = {"digests": (np.dtype(np.uint8), DIGEST_BYTES), "signatures": merger.signature}
        for kind, wanted in (("digests", first), ("signatures", near)):
            if wanted is not None:
                folder = merger.out / FINGERPRINTS
                folder.mkdir(exist_ok=True)
                self._handles[kind] = (folder / f"{source.name}.{kind}").open("wb")
                for before in merger._known(source, kind, *known[kind]):
                    self._handles[kind].write(before.tobytes())

    def add(self, part: Part, keep: np.ndarray) -> None:
        for kind, handle in self._handles.items():
            handle.write(part.array(kind)[keep].tobytes() if keep.any() else b"")

    def __enter__(self) -> _Fingerprints:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            handle.close()


def _similar(near: NearDuplicates, signatures: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """bool[n]: which of the documents to keep are similar to one before."""
    similar = np.zeros(len(keep), dtype=bool)
    for i in np.flatnonzero(keep):
        similar[i] = not near.first_seen(signatures[i])
    return similar


def _add(writer: IndexedWriter, part: Part, lengths: np.ndarray, keep: np.ndarray) -> None:
    ids = part.array("ids")
    if not keep.all():
        ids, lengths = ids[np.repeat(keep, lengths)], lengths[keep]
    writer.add_all(ids, lengths)


def _row(file: str, line: int, reason: str) -> bytes:
    return (json.dumps({"file": file, "line": line, "reason": reason}) + "\n").encode()
