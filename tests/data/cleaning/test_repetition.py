"""The n-gram measures against plain loops over the same definition."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from largeformer.data.cleaning.repetition import duplicate_ngrams, ngram_keys, top_ngram


def plain_top(found: list[str], n: int) -> float:
    grams = Counter(tuple(found[i : i + n]) for i in range(len(found) - n + 1))
    most = max(grams.values(), default=0)
    (first,) = [gram for gram, count in grams.items() if count == most][:1] or [()]
    return min(1.0, most * sum(map(len, first)) / sum(map(len, found))) if most > 1 else 0.0


def plain_duplicate(found: list[str], n: int) -> float:
    seen, covered = set(), set()
    for i in range(len(found) - n + 1):
        gram = tuple(found[i : i + n])
        if gram in seen:
            covered |= set(range(i, i + n))
        seen.add(gram)
    return sum(len(found[i]) for i in covered) / sum(map(len, found))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10])
def test_against_plain_loops(n: int) -> None:
    rng = random.Random(n)
    for _ in range(100):
        # Words of one length: where two n-grams are equally frequent, either may count.
        found = [rng.choice(["aa", "bb", "cc", "日本"[: rng.choice([2])]]) for _ in range(rng.randrange(1, 40))]
        ids = np.array([["aa", "bb", "cc", "日本"].index(word) for word in found], dtype=np.uint64)
        lengths = np.array([len(word) for word in found])
        assert top_ngram(ids, lengths, n) == pytest.approx(plain_top(found, n))
        assert duplicate_ngrams(ids, lengths, n) == pytest.approx(plain_duplicate(found, n))


def test_keys_tell_ngrams_apart() -> None:
    """All pairs of 300 numbers, in both orders."""
    ids = np.array([x for i in range(300) for j in range(300) for x in (i, j)], dtype=np.uint64)
    assert len(set(ngram_keys(ids, 2)[::2].tolist())) == 300 * 300
