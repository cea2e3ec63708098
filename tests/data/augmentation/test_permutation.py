"""Who is permuted, how far, and that no target gets into the input that it is predicted from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from largeformer.config.augment import AugmentConfig
from largeformer.data.augmentation.mixup import mixup
from largeformer.data.augmentation.permutation import (
    PermutedSentences,
    SentenceEnds,
    permuted_input,
    permuted_sentences,
    permuted_together,
    training_samples,
    window_order,
)
from largeformer.data.splits import sample_of
from largeformer.data.tokenization.tokenizer import MockTokenizer
from largeformer.data.windows import Sample

# A vocabulary of words: 0 ends documents.
PIECES = ["", "A", " a", ".", " B", " b", "!", "你好", "。", "3", "\n", " c", '."', " D"]
EOD = 0


def decode(ids: Any) -> str:
    return "".join(PIECES[i] for i in ids)


ENDS = SentenceEnds.of(decode, len(PIECES), EOD)


@pytest.mark.parametrize("window", [2, 3, 8])
def test_tokens_move_less_than_the_window(window: int) -> None:
    rng = np.random.default_rng(0)
    far = set()
    for _ in range(300):
        order = window_order(50, window, rng)
        assert sorted(order) == list(range(50))
        far |= set(np.abs(order - np.arange(50)).tolist())
    assert set(range(window - 1)) <= far <= set(range(window))


def test_special_ids_keep_their_places() -> None:
    rng, mask = np.random.default_rng(1), 99
    for _ in range(100):
        ids = rng.integers(1, 50, 40)
        ids[rng.integers(0, 40, 6)] = mask
        ids[0], ids[-3:] = 98, 97
        permuted = permuted_input(ids, 4, rng, special={mask, 97, 98})
        assert sorted(permuted) == sorted(ids)
        assert all((permuted == special).tolist() == (ids == special).tolist() for special in (97, 98, mask))


def test_a_masked_target_is_nowhere_in_the_input() -> None:
    """Each id stands once, so that a hidden one could be seen anywhere."""
    rng, mask = np.random.default_rng(2), 1000
    for _ in range(100):
        targets = rng.permutation(200)[:60]
        hidden = rng.random(60) < 0.15
        permuted = permuted_input(np.where(hidden, mask, targets), 5, rng, special={mask})
        assert not set(targets[hidden].tolist()) & set(permuted.tolist())
        assert ((permuted == mask) == hidden).all()


def test_labels_of_tokens_move_with_them() -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 100, 64)
    permuted, labels = permuted_together(ids, ids * 7, 6, rng)
    assert (labels == permuted * 7).all() and (permuted != ids).any()


CUTS = {
    "full stop before a blank": ([1, 2, 3, 4, 5, 3, 2], [3, 6]),
    "decimal": ([9, 3, 9, 3, 4], [4]),
    "exclamation": ([1, 6, 4], [2]),
    "Chinese needs no blank": ([7, 8, 7, 8, 9], [2, 4]),
    "closing quote": ([1, 12, 4, 5], [2]),
    "line and blank line": ([1, 10, 2, 10, 10, 5], [4]),
    "documents": ([1, 2, 0, 1, 2], [2, 3]),
    "nothing": ([1, 2, 5], []),
}


@pytest.mark.parametrize(("ids", "cuts"), CUTS.values(), ids=CUTS)
def test_where_sentences_end(ids: list[int], cuts: list[int]) -> None:
    assert ENDS.cuts(np.array(ids)).tolist() == cuts


def test_blanks_are_found_behind_a_tokenizer_that_takes_the_first_away() -> None:
    """As those with a space in front of every text do."""
    ends = SentenceEnds.of(lambda ids: decode(ids).removeprefix(" "), len(PIECES), EOD)
    for name, expected in vars(ENDS).items():
        assert np.array_equal(getattr(ends, name), expected), name


def test_sentences_stay_whole_in_their_document() -> None:
    # A part, three sentences, a document's end, three sentences, a part.
    ids = np.array([2, 3, 4, 5, 3, 13, 3, 11, 6, EOD, 1, 3, 4, 6, 5, 3, 2, 2])
    rng, seen = np.random.default_rng(4), set()
    for _ in range(300):
        permuted = permuted_sentences(ids, ENDS, rng).tolist()
        assert permuted[:2] == [2, 3] and permuted[9] == EOD and permuted[-2:] == [2, 2]
        assert sorted(permuted[:9]) == sorted(ids[:9])
        first, second = decode(permuted[2:9]), decode(permuted[10:16])
        seen.add((first, second))
        assert all(part in first for part in (" B b.", " D.", " c!")) and all(part in second for part in ("A.", " B!", " b."))
    # The last whole sentence before the end of a document stays: nothing tells it from a part.
    assert len(seen) > 4


class Numbered:
    """Samples of ids, all different."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return sample_of(self.rows[index][:-1], self.rows[index][1:], len(self.rows[index]) - 1)


def test_causal_targets_are_the_input_shifted() -> None:
    """Permuted before targets are made: a label is the next token, and stands nowhere before by the permutation."""
    rows = np.random.default_rng(5).integers(0, len(PIECES), (40, 65))
    plain = Numbered(rows)
    varied = PermutedSentences(plain, ENDS, 1.0, seed=7)
    for i in range(len(plain)):
        sample, before = varied[i], plain[i]
        assert (sample["tokens"][1:] == sample["labels"][:-1]).all()
        assert sorted([*sample["tokens"].tolist(), sample["labels"][-1]]) == sorted(rows[i].tolist())
        assert (sample["loss_mask"] == before["loss_mask"]).all() and sample["tokens"].dtype == np.int64
        assert ((sample["tokens"] == EOD) == (before["tokens"] == EOD)).all()
        assert (varied[i]["tokens"] == sample["tokens"]).all()
    assert sum((varied[i]["tokens"] != plain[i]["tokens"]).any() for i in range(40)) > 30


def test_probability_and_seed_of_permuted_samples() -> None:
    plain = Numbered(np.tile(np.array([1, 3, 4, 6, 5, 3, 13, 3, 11, 6, 2, 2]), (400, 1)))
    half = PermutedSentences(plain, ENDS, 0.5, seed=1)
    changed = [(half[i]["tokens"] != plain[i]["tokens"]).any() for i in range(400)]
    assert 120 < sum(changed) < 220  # of the 200 that are permuted some come out in their old order
    other = PermutedSentences(plain, ENDS, 0.5, seed=2)
    assert changed != [(other[i]["tokens"] != plain[i]["tokens"]).any() for i in range(400)]


def test_only_what_is_asked_for_is_permuted() -> None:
    plain, tokenizer = Numbered(np.ones((1, 4), dtype=np.int64)), MockTokenizer(16)
    assert training_samples(plain, None, tokenizer, 0) is plain
    assert training_samples(plain, AugmentConfig(), tokenizer, 0) is plain
    assert isinstance(training_samples(plain, AugmentConfig(permute_sentences=True), tokenizer, 0), PermutedSentences)


def test_mixup_mixes_embeddings_and_loss() -> None:
    embeddings, labels = torch.randn(8, 5, 4), torch.randint(0, 3, (8,))
    mask = torch.arange(5)[None] < torch.randint(1, 6, (8, 1))
    mixed = mixup(embeddings, 0.4, seed=1, step=3, mask=mask)
    for i, partner in enumerate(mixed.partners.tolist()):
        assert mixed.embeddings[i].allclose(mixed.share * embeddings[i] + (1 - mixed.share) * embeddings[partner])
        assert mixed.mask is not None and mixed.mask[i].equal(mask[i] | mask[partner])
    logits = torch.randn(8, 3)
    # The same as the cross-entropy against mixed one-hot labels, which PyTorch knows.
    hot = torch.nn.functional.one_hot(labels, 3).float()
    target = mixed.share * hot + (1 - mixed.share) * hot[mixed.partners]
    assert mixed.loss(logits, labels).allclose(torch.nn.functional.cross_entropy(logits, target))


def test_mixup_is_seeded_and_off_in_evaluation() -> None:
    embeddings = torch.randn(16, 3, 2)
    first, again, later = (mixup(embeddings, 0.4, seed=1, step=step) for step in (3, 3, 4))
    assert first.share == again.share != later.share and first.partners.equal(again.partners)
    assert mixup(embeddings, 0.4, 1, 3, data_rank=1).share != first.share
    evaluated = mixup(embeddings, 0.4, 1, 3, training=False)
    assert evaluated.embeddings is embeddings and evaluated.share == 1.0
    alone = mixup(embeddings[:1], 0.4, 1, 3)
    assert alone.embeddings.equal(embeddings[:1])


def test_mixup_shares_follow_their_distribution() -> None:
    shares = np.array([mixup(torch.zeros(2, 1), 0.4, 0, step).share for step in range(2000)])
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
    assert abs(shares.mean() - 0.5) < 0.04 and abs(shares.var() - 1 / (4 * 1.8)) < 0.01
