"""Documents that repeat themselves, by the measures of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from largeformer.config.cleaning import RepetitionStep
from largeformer.data.cleaning.words import words

_TOP, _DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
_PARAGRAPH_END = re.compile(r"\n(?:[^\S\n]*\n)+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd: the product of a number with it names the number


def repetition_reason(text: str, step: RepetitionStep) -> str | None:
    """Which limit of `step` the text is beyond, or None. The first one, cheap ones first."""
    for name, value in _measures(text, step):
        limit = getattr(step, name)
        if value > limit:
            return f"repetition: {name} above {limit:g}"
    return None


def _measures(text: str, step: RepetitionStep) -> Iterator[tuple[str, float]]:
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    paragraphs = [paragraph for paragraph in (part.strip() for part in _PARAGRAPH_END.split(text)) if paragraph]
    for kind, parts in (("line", lines), ("paragraph", paragraphs)):
        count, characters = _repeated(parts)
        yield f"duplicate_{kind}s", count
        yield f"duplicate_{kind}_characters", characters
    found = words(text)
    ids, lengths = _numbered(found)
    for n in _TOP:
        if getattr(step, f"top_{n}gram") < 1.0:
            yield f"top_{n}gram", top_ngram(ids, lengths, n)
    for n in _DUPLICATE:
        if getattr(step, f"duplicate_{n}gram") < 1.0:
            yield f"duplicate_{n}gram", duplicate_ngrams(ids, lengths, n)


def _repeated(parts: Sequence[str]) -> tuple[float, float]:
    """The part of `parts` that have stood before, by number and by characters."""
    more = [(part, count - 1) for part, count in Counter(parts).items() if count > 1]
    total = sum(map(len, parts))
    return sum(count for _, count in more) / max(1, len(parts)), sum(len(part) * count for part, count in more) / max(1, total)


def _numbered(found: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """uint64[w] and int64[w]: a number for each different word, and its characters."""
    numbers: dict[str, int] = {}
    ids = np.fromiter((numbers.setdefault(word, len(numbers)) for word in found), dtype=np.uint64, count=len(found))
    return ids, np.fromiter(map(len, found), dtype=np.int64, count=len(found))


def ngram_keys(ids: np.ndarray, n: int) -> np.ndarray:
    """uint64[w - n + 1]: one number for each n `ids` (uint64[w]) in a row, a polynomial modulo 2^64; empty where there are fewer."""
    count = len(ids) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    keys = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        keys = mixed(keys, ids[i : i + count])
    return keys


def mixed(keys: np.ndarray, more: np.ndarray) -> np.ndarray:
    """uint64: `keys` with one more number taken in, each."""
    keys = keys * _PRIME + more
    return keys ^ (keys >> np.uint64(29))


def top_ngram(ids: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The part of all words' characters that stands in the most frequent n-gram; 0 where none stands twice."""
    keys = ngram_keys(ids, n)
    if not len(keys):
        return 0.0
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    best = counts.argmax()
    characters = lengths[first[best] : first[best] + n].sum() * counts[best]
    return min(1.0, float(characters / lengths.sum())) if counts[best] > 1 else 0.0


def duplicate_ngrams(ids: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The part of all words' characters that stands in an n-gram that has stood before, each character counted once."""
    keys = ngram_keys(ids, n)
    if not len(keys):
        return 0.0
    repeated = np.ones(len(keys), dtype=np.int64)
    repeated[np.unique(keys, return_index=True)[1]] = 0
    covered = np.convolve(repeated, np.ones(n, dtype=np.int64)) > 0
    return float(lengths[covered].sum() / lengths.sum())
