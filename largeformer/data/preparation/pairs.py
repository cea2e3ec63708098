"""A Megatron pair that somebody else made, as a source: looked through once, then linked, never copied."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from largeformer.data.indexed import open_indexed
from largeformer.data.indexed_writer import bin_path, idx_path
from largeformer.data.preparation.statistics import SourceStatistics
from largeformer.data.tokenization.tokenizer import Tokenizer
from largeformer.errors import BadInputError

_BLOCK = 2**22


def link_pair(pair: Path, link: Path, tokenizer: Tokenizer, statistics: SourceStatistics) -> None:
    """Make `link` stand for `pair`, and count its documents, tokens and bytes of text.

    Raises BadInputError where the pair is damaged, holds ids that the tokenizer has not, or documents without an end.
    """
    if bin_path(pair).stat().st_size == 0:
        raise BadInputError(f"{bin_path(pair)} holds no document (0 bytes): leave it out of data.sources")
    dataset = open_indexed(pair, tokenizer.vocab_size)
    ids = np.memmap(bin_path(pair), dtype=dataset.index.dtype, mode="r")
    lengths = np.asarray(dataset.sequence_lengths)
    _check_ends(pair, ids, lengths, tokenizer.eod)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for start in range(0, ids.size, _BLOCK):
        block = np.asarray(ids[start : start + _BLOCK])
        if int(block.min()) < 0 or int(block.max()) >= tokenizer.vocab_size:
            raise BadInputError(
                f"{bin_path(pair)} holds ids from {block.min()} to {block.max()}, the tokenizer those below {tokenizer.vocab_size}: "
                "give the tokenizer that made it as tokenizer.model"
            )
        counts += np.bincount(block, minlength=tokenizer.vocab_size)
    statistics.read += len(lengths)
    unknown = int(counts[tokenizer.unknown]) if tokenizer.unknown >= 0 else 0
    statistics.keep(lengths, int(counts @ tokenizer.piece_bytes.astype(np.int64)), unknown)
    for path, name in ((bin_path(pair), bin_path(link)), (idx_path(pair), idx_path(link))):
        os.symlink(path.resolve(), name)


def _check_ends(pair: Path, ids: np.ndarray, lengths: np.ndarray, eod: int) -> None:
    without, start = 0, 0
    for first in range(0, len(lengths), _BLOCK):
        ends = start + np.cumsum(lengths[first : first + _BLOCK], dtype=np.int64)
        without += int((ids[ends - 1] != eod).sum())
        start = int(ends[-1])
    if without:
        raise BadInputError(
            f"{without} of {len(lengths)} documents of {bin_path(pair)} do not end with id {eod}, the tokenizer's end of document: make "
            "the pair with Megatron's --append-eod, and with the tokenizer that tokenizer.model names (tokenizer.eod_token names its token)"
        )
