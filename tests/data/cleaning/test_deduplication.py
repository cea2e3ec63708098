"""Digests, signatures against the exact Jaccard similarity, and which of similar documents stay."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from largeformer.config.cleaning import MinHashConfig
from largeformer.data.cleaning.deduplication import MinHasher, NearDuplicates, bands, text_digest

SENTENCES = "今天天气很好，我们一起去公园散步。那里有很多花，红的黄的都有。孩子们在草地上放风筝，老人们坐在树下下棋。"


def mutated(rng: random.Random, found: list[str], changes: int) -> list[str]:
    found = list(found)
    for _ in range(changes):
        found[rng.randrange(len(found))] = f"new{rng.randrange(10**6)}"
    return found


def jaccard(a: list[str], b: list[str], n: int) -> float:
    first, second = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a, b))
    return len(first & second) / len(first | second)


def random_words(rng: random.Random, count: int) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def test_digest() -> None:
    assert text_digest("中文") == text_digest("中" + "文") != text_digest("中文 ")
    assert len(text_digest("")) == 16


@pytest.mark.parametrize("permutations", [64, 256])
@pytest.mark.parametrize("ngram", [1, 5])
def test_signatures_estimate_jaccard(permutations: int, ngram: int) -> None:
    rng, hasher = random.Random(0), MinHasher(MinHashConfig(permutations=permutations, ngram=ngram))
    errors = []
    for _ in range(60):
        a = random_words(rng, 400)
        b = mutated(rng, a, rng.randrange(60))
        agree = np.mean(hasher.signature(" ".join(a)) == hasher.signature(" ".join(b)))
        errors.append(agree - jaccard(a, b, ngram))
    # The estimate of k numbers has a variance of J (1 - J) / k <= 1 / 4k; rensa's is smaller.
    assert np.sqrt(np.mean(np.square(errors))) < 0.5 / permutations**0.5
    assert abs(np.mean(errors)) < 4 * 0.5 / (permutations * 60) ** 0.5


def test_what_does_not_count() -> None:
    signature = MinHasher(MinHashConfig()).signature
    assert (signature("The quick, brown fox jumps over it!") == signature("the QUICK brown\n fox - jumps over it")).all()
    assert not (signature("a b") == signature("b a")).all()
    assert not (signature("你好") == signature("好你")).all()
    assert not (signature("!!!") == signature("???")).any()


def test_signatures_are_the_same_in_every_process() -> None:
    code = (
        "from largeformer.config.cleaning import MinHashConfig; from largeformer.data.cleaning.deduplication import MinHasher;"
        f"print(MinHasher(MinHashConfig()).signature({SENTENCES!r}).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert MinHasher(MinHashConfig()).signature(SENTENCES).tolist() == eval(other.stdout)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_bands_miss_little_and_are_few(threshold: float) -> None:
    config = MinHashConfig(threshold=threshold)
    count = bands(config)
    rows = config.permutations // count
    assert (1 - threshold**rows) ** count <= 0.01
    fewer = config.permutations // (rows + 1)
    assert rows == config.permutations or (1 - threshold ** (rows + 1)) ** fewer > 0.01


def test_the_first_of_similar_documents_stays() -> None:
    rng, config = random.Random(1), MinHashConfig()
    hasher, seen = MinHasher(config), NearDuplicates(config)
    originals = [random_words(rng, 300) for _ in range(200)]
    assert all(seen.first_seen(hasher.signature(" ".join(words))) for words in originals)
    near = [mutated(rng, words, 2) for words in originals]  # similarity about 0.93
    far = [mutated(rng, words, 60) for words in originals]  # about 0.3
    assert sum(seen.first_seen(hasher.signature(" ".join(words))) for words in near) <= 2
    assert all(seen.first_seen(hasher.signature(" ".join(words))) for words in far)
    assert 400 <= len(seen) <= 402


def test_what_was_dropped_does_not_drop_others() -> None:
    """Only what stays is compared with: a chain of small changes does not wander off."""
    rng, config = random.Random(2), MinHashConfig(permutations=256)
    hasher, seen = MinHasher(config), NearDuplicates(config)
    words, kept = random_words(rng, 400), []
    for _ in range(40):
        words = mutated(rng, words, 2)
        if seen.first_seen(hasher.signature(" ".join(words))):
            kept.append(words)
    assert 3 < len(kept) < 30
    assert all(jaccard(a, b, 5) < 0.9 for i, a in enumerate(kept) for b in kept[:i])


def test_many_documents_with_one_band_in_common() -> None:
    config = MinHashConfig(permutations=128)
    rng, seen = np.random.default_rng(0), NearDuplicates(config)
    rows = rng.integers(0, 2**32, (1500, 128), dtype=np.uint32)
    rows[:, :: bands(config)] = 7  # The first band of each.
    assert all(seen.first_seen(row) for row in rows)
    assert not any(seen.first_seen(row) for row in rows)


def test_chinese_near_duplicates() -> None:
    config = MinHashConfig(threshold=0.6)
    hasher, seen = MinHasher(config), NearDuplicates(config)
    assert seen.first_seen(hasher.signature(SENTENCES))
    assert not seen.first_seen(hasher.signature(SENTENCES.replace("很好", "不错")))
    assert seen.first_seen(hasher.signature("完全不同的一段文字，讲的是火车和铁路的历史，从蒸汽机车说到高速列车。"))
