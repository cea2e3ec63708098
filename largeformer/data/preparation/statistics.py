"""What came of the sources, in numbers: written as `statistics.json`, shown as a table and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from largeformer.data.preparation.parts import Notes

_KINDS, _SAMPLES_PER_KIND = 12, 2
_REASONS = 50
LENGTH_BINS = 32
# Of a reason of the quarantine, what is the same in many rows.
_DETAILS = re.compile(r":.*| among .*| at character .*| \d+$", re.DOTALL)


@dataclass
class SourceStatistics:
    """One source. read: documents before cleaning. bytes: of text kept, as UTF-8; with bytes_per_token as the vocabulary counts them.

    dropped: reason -> documents; changed: cleaning step -> documents; quarantined: kind of reason -> inputs.
    lengths: documents of 2^i to 2^(i+1) - 1 tokens, their end included.
    """

    name: str
    path: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    unknown: int = 0
    read: int = 0
    rejected: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)

    def note(self, notes: Notes) -> None:
        """Add what was read, rejected, and dropped or changed by cleaning."""
        self.read += notes.read
        self.rejected += len(notes.rejected)
        _add(self.dropped, notes.dropped)
        _add(self.changed, notes.changed)
        for _, _, reason in notes.rejected:
            kind = _DETAILS.sub("", reason)
            _add(self.quarantined, {kind if kind in self.quarantined or len(self.quarantined) < _REASONS else "other": 1})

    def drop(self, reason: str, count: int) -> None:
        if count:
            _add(self.dropped, {reason: count})

    def keep(self, lengths: np.ndarray, sizes: int, unknown: int) -> None:
        """Add documents that stay: lengths[n] in tokens, and the bytes of text and unknown tokens of all of them."""
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.bytes += sizes
        self.unknown += unknown
        exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1  # a Megatron pair may hold documents of no token
        bins = np.bincount(exponents, minlength=LENGTH_BINS) if len(lengths) else [0] * LENGTH_BINS
        self.lengths = [int(before + new) for before, new in zip(self.lengths, bins, strict=True)]


@dataclass
class Statistics:
    """All sources, and samples of documents before and after cleaning."""

    sources: list[SourceStatistics]
    samples: list[dict[str, Any]] = field(default_factory=list)

    def total(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.sources)

    def totals(self, name: str) -> dict[str, int]:
        """A count by reason over all sources, the most frequent first."""
        total: dict[str, int] = {}
        for source in self.sources:
            _add(total, getattr(source, name))
        return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))

    @property
    def inputs(self) -> int:
        """Everything that was looked at: documents before cleaning, and what was rejected."""
        return self.total("read") + self.total("rejected")

    def sample(self, notes: Notes) -> None:
        """Keep up to two samples of each kind of change, of the first dozen kinds."""
        for sample in notes.samples:
            kinds = [(other["changed"], other["dropped"]) for other in self.samples]
            kind = (sample["changed"], sample["dropped"])
            distinct = len({json.dumps(other) for other in kinds})
            if kinds.count(kind) < (_SAMPLES_PER_KIND if any(kind) else 1) and (kind in kinds or distinct < _KINDS):
                self.samples.append(sample)

    def dump(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode("utf-8", errors="backslashreplace")

    @classmethod
    def load(cls, path: Path) -> Statistics:
        raw = json.loads(path.read_bytes())
        return cls([SourceStatistics(**source) for source in raw["sources"]], raw["samples"])


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count
