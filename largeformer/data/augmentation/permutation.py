"""Tokens out of order ("confusion" training), by objective, so that no target leaks into the input. `s` sequence.

masked LM, sequence to sequence, classification    the input is permuted inside a window, the target is not (Lample et al. 2018,
                                                   arXiv:1711.00043, section 2.3): `permuted_input`
named entities                                     a target belongs to its token: both move: `permuted_together`
causal LM                                          its targets are its inputs, shifted: sentences change places before targets are made
                                                   (BART, Lewis et al. 2019, arXiv:1910.13461): `PermutedSentences`
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from largeformer.config.augment import AugmentConfig
from largeformer.data.splits import Samples
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer
from largeformer.data.windows import Sample

_ENDS = ("。", "！", "？", "…", "।")
_ENDS_BEFORE_BLANK = (".", "!", "?", "؟")
_CLOSING = "\"')]}»”’」』"


def window_order(count: int, window: int, rng: np.random.Generator, fixed: Container[int] = ()) -> np.ndarray:
    """int64[count]: which position comes at each place. All but the `fixed` move by less than `window` places among themselves.

    Each position i is sorted by i plus a number drawn from [0, window).
    """
    free = np.array([i for i in range(count) if i not in fixed], dtype=np.int64)
    order = np.arange(count)
    order[free] = free[np.argsort(np.arange(len(free)) + rng.uniform(0, window, len(free)), kind="stable")]
    return order


def permuted_input(ids: np.ndarray, window: int, rng: np.random.Generator, special: Container[int] = ()) -> np.ndarray:
    """[s] -> [s]: the input with its tokens out of order; ids in `special` (masks, [CLS], padding) keep their places.

    For a masked LM give masked ids, and keep the targets as they are: a mask stands where its target is counted, and what a mask hides
    stands nowhere in the input.
    """
    fixed = {i for i, token in enumerate(ids.tolist()) if token in special}
    return ids[window_order(len(ids), window, rng, fixed)]


def permuted_together(
    ids: np.ndarray, targets: np.ndarray, window: int, rng: np.random.Generator, special: Container[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """[s], [s] -> [s], [s]: tokens with their own targets, for labels of tokens."""
    fixed = {i for i, token in enumerate(ids.tolist()) if token in special}
    order = window_order(len(ids), window, rng, fixed)
    return ids[order], targets[order]


@dataclass(frozen=True)
class SentenceEnds:
    """Where sentences end among token ids. All bool[v], by id; eod: the id between documents. A blank line ends one, a line does not."""

    ends: np.ndarray
    ends_before_blank: np.ndarray
    begins_blank: np.ndarray
    ends_line: np.ndarray
    begins_line: np.ndarray
    eod: int

    @classmethod
    def of(cls, decode: Callable[[Sequence[int]], str], vocab_size: int, eod: int) -> SentenceEnds:
        """From what each id stands for. A full stop ends a sentence before a blank only: 3.5 and example.org are whole."""
        alone = [decode([i]) for i in range(vocab_size)]
        # Behind a letter: a text's own first blank is lost where its tokenizer puts one in front.
        word = next(([i] for i, piece in enumerate(alone) if piece.isalpha()), [])
        begun = len(decode(word))
        pieces = [decode([*word, i])[begun:] for i in range(vocab_size)] if word else alone
        bare = [piece.rstrip(" \t").rstrip(_CLOSING) for piece in pieces]
        return cls(
            np.array([text.endswith(_ENDS) or piece.endswith("\n\n") for piece, text in zip(pieces, bare, strict=True)]),
            np.array([text.endswith(_ENDS_BEFORE_BLANK) for text in bare]),
            np.array([piece[:1].isspace() for piece in pieces]),
            np.array([piece.endswith("\n") for piece in pieces]),
            np.array([piece.startswith("\n") for piece in pieces]),
            eod,
        )

    def cuts(self, ids: np.ndarray) -> np.ndarray:
        """Positions in int64[n] `ids` where a sentence begins, or where a document ends; the first and the end are left out."""
        before, after = ids[:-1], ids[1:]
        at_end = self.ends[before] | (self.ends_before_blank[before] & self.begins_blank[after])
        at_end |= self.ends_line[before] & self.begins_line[after]
        return np.flatnonzero(at_end | (before == self.eod) | (after == self.eod)) + 1


@dataclass(frozen=True)
class PermutedSentences:
    """Samples for a causal LM in which, with `probability`, the sentences of each document stand in another order.

    What a sample begins and ends with may be a part of a sentence and stays in place, as do the ends of documents: so whatever goes by
    documents (masks, positions) holds. Tokens are permuted before targets are made: each is still predicted from all that stands before it.
    Sample numbers run on over the epochs, so that each epoch has its own order; they and the seed decide, not the layout.
    """

    samples: Samples
    sentences: SentenceEnds
    probability: float
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        rng = np.random.default_rng([self.seed, index])
        if rng.random() >= self.probability:
            return sample
        ids = permuted_sentences(np.append(sample["tokens"], sample["labels"][-1]), self.sentences, rng)
        return {**sample, "tokens": ids[:-1], "labels": ids[1:]}


def permuted_sentences(ids: np.ndarray, sentences: SentenceEnds, rng: np.random.Generator) -> np.ndarray:
    """int64[n] -> int64[n]: the whole sentences of each document in another order."""
    parts = np.split(ids, sentences.cuts(ids))
    order = np.arange(len(parts))
    barriers = [0, *(i for i, part in enumerate(parts) if part[0] == sentences.eod), len(parts) - 1]
    for first, last in pairwise(barriers):
        order[first + 1 : last] = rng.permutation(order[first + 1 : last])
    return np.concatenate([parts[i] for i in order])


def training_samples(samples: Samples, augment: AugmentConfig | None, tokenizer: Tokenizer | MockTokenizer, seed: int) -> Samples:
    """The training samples of a causal LM as `data.augment` asks for them; to be called for no other split."""
    if augment is None or not augment.permute_sentences:
        return samples
    sentences = SentenceEnds.of(tokenizer.decode, tokenizer.vocab_size, tokenizer.eod)
    return PermutedSentences(samples, sentences, augment.probability, seed)
