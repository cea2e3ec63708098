"""The same text again, and nearly the same: digests, and MinHash signatures (Broder 1997) by rensa.

Signatures are made where texts are cleaned, in any process; `NearDuplicates` sees them in document order, in one. Its memory grows with the
documents that are kept: docs/cleaning.md states by how much.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from largeformer.config.cleaning import MinHashConfig
from largeformer.data.cleaning.repetition import mixed, ngram_keys
from largeformer.data.cleaning.words import words
from largeformer.errors import BadInputError

_SEED = 1
_DIGEST_BYTES = 16


def text_digest(text: str) -> bytes:
    """16 bytes that name a text: equal texts have equal ones, and no two others in practice (BLAKE2b)."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=_DIGEST_BYTES).digest()


@dataclass(frozen=True)
class MinHasher:
    """`signature(text)`: uint32[permutations]. The part in which two signatures agree estimates how alike the texts' n-grams are.

    Words are compared without regard to case, punctuation and blanks. A text of fewer than `ngram` words is one n-gram of all of them; one
    without a word is its characters. Raises BadInputError where rensa is not installed.
    """

    config: MinHashConfig

    def __post_init__(self) -> None:
        try:
            import rensa  # noqa: F401
        except ImportError as error:
            raise BadInputError("data.deduplicate.near needs rensa: pip install 'largeformer[data]', or set it to null") from error

    def signature(self, text: str) -> np.ndarray:
        from rensa import RMinHash

        keys = self._ngrams(text)
        rows = RMinHash.digest_matrix_from_flat_token_hashes(keys, [0, len(keys)], self.config.permutations, _SEED).to_rows()
        return np.array(rows[0], dtype=np.uint32)

    def _ngrams(self, text: str) -> np.ndarray:
        """uint64[n]: one number for each n-gram, the same in every process."""
        found = words(text.lower()) or list(text)
        numbers = {word: zlib.crc32(word.encode("utf-8")) for word in set(found)}
        ids = np.fromiter(map(numbers.__getitem__, found), dtype=np.uint64, count=len(found))
        return ngram_keys(ids, max(1, min(self.config.ngram, len(ids))))


class NearDuplicates:
    """The signatures that were kept so far, found again by locality-sensitive hashing (Leskovec et al. 2020, chapter 3).

    A signature is cut into bands; those that share a whole band with an earlier one are compared with it in full.
    """

    def __init__(self, config: MinHashConfig) -> None:
        self._config = config
        self._bands = bands(config)
        rows = config.permutations // self._bands
        self._rows = rows
        self._kept = np.empty((1024, config.permutations), dtype=np.uint32)
        self._count = 0
        # Of each band: what stands in it -> the first kept signature, and the further ones.
        self._first: list[dict[int, int]] = [{} for _ in range(self._bands)]
        self._further: dict[tuple[int, int], list[int]] = {}

    def __len__(self) -> int:
        """How many signatures were kept."""
        return self._count

    def first_seen(self, signature: np.ndarray) -> bool:
        """Whether nothing kept is alike; then `signature` (uint32[permutations]) is kept. To be asked in document order."""
        keys = self._keys(signature)
        if self._has_like(signature, keys):
            return False
        self._keep(signature, keys)
        return True

    def _keys(self, signature: np.ndarray) -> list[int]:
        """A number for each band."""
        rows = signature[: self._bands * self._rows].astype(np.uint64).reshape(self._rows, self._bands)
        keys = rows[0]
        for row in rows[1:]:
            keys = mixed(keys, row)
        return keys.tolist()  # type: ignore[no-any-return]

    def _has_like(self, signature: np.ndarray, keys: Sequence[int]) -> bool:
        found = {first for band, key in enumerate(keys) if (first := self._first[band].get(key)) is not None}
        if not found:
            return False
        if self._further:
            found.update(*(self._further.get((band, key), ()) for band, key in enumerate(keys)))
        agreeing = (self._kept[list(found)] == signature).sum(axis=1)
        return bool(agreeing.max() >= self._config.threshold * self._config.permutations)

    def _keep(self, signature: np.ndarray, keys: Sequence[int]) -> None:
        if self._count == len(self._kept):
            self._kept = np.concatenate([self._kept, np.empty_like(self._kept)])
        self._kept[self._count] = signature
        for band, key in enumerate(keys):
            if self._first[band].setdefault(key, self._count) != self._count:
                self._further.setdefault((band, key), []).append(self._count)
        self._count += 1


def bands(config: MinHashConfig) -> int:
    """How many bands find what is alike by `threshold`: the fewest that miss at most 1 % of the pairs right at it.

    A pair of similarity t shares one of b bands of r rows with probability 1 - (1 - t^r)^b; fewer bands of more rows compare less.
    """
    best = config.permutations
    for rows in range(1, config.permutations + 1):
        count = config.permutations // rows
        if (1 - config.threshold**rows) ** count <= 0.01:
            best = count
    return best
