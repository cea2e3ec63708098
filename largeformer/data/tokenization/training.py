"""Training of a SentencePiece model on a bounded sample of text."""

from __future__ import annotations

import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from largeformer.artifact import write_atomically
from largeformer.config.data import TokenizerConfig
from largeformer.config.tokenizer_rules import SPECIAL_TOKENS
from largeformer.data.tokenization.sentencepiece import SentencePieceTokenizer
from largeformer.errors import BadInputError

# Unigram training sums over threads: the number is part of the result, so it must not follow the machine.
_TRAINING_THREADS = 4
_TRAINING_TEXT_BYTES = 32 * 1024


def sample_bytes(config: TokenizerConfig) -> int:
    """Bytes of text that training reads: as given, else 2 KiB for each id, at least 8 MiB. More changes the pieces little."""
    return config.sample_bytes or max(8 * 2**20, 2048 * config.vocab_size)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path, symbols: Sequence[str] = ()) -> SentencePieceTokenizer:
    """Train a model on a sample of `texts`, write it to `path` and return it.

    symbols: single ids beside `config.user_symbols`. The same texts give the same file on any machine. Raises BadInputError
    where vocab_size does not suit the text.
    """
    sample = _sample(texts, sample_bytes(config))
    if not sample:
        raise BadInputError("data.sources hold no text to train a tokenizer on: give a source with text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            # Code is indented: runs of blanks deserve ids of their own.
            allow_whitespace_only_pieces=True,
            unk_id=SPECIAL_TOKENS.index("<unk>"),
            bos_id=SPECIAL_TOKENS.index("<s>"),
            eos_id=SPECIAL_TOKENS.index("</s>"),
            pad_id=SPECIAL_TOKENS.index("<pad>"),
            control_symbols=list(SPECIAL_TOKENS[4:]),
            user_defined_symbols=list(dict.fromkeys([*config.user_symbols, *symbols])),
            max_sentence_length=4 * _TRAINING_TEXT_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, config, sum(len(text.encode()) for text in sample)) from error
    write_atomically(path, model.getvalue())
    return SentencePieceTokenizer(model.getvalue(), config.eod_token, config.pad_token)


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """A random part of `texts` of at most `max_bytes`, in their order; all where they fit. One pass, memory bounded by `max_bytes`.

    Each piece of text draws a number, and those with the smallest stay.
    """
    draw = random.Random(0)
    heap: list[tuple[float, int, str]] = []
    held = 0
    for position, text in enumerate(_cut(texts)):
        heapq.heappush(heap, (-draw.random(), position, text))
        held += len(text.encode("utf-8"))
        while held > max_bytes:
            held -= len(heapq.heappop(heap)[2].encode("utf-8"))
    return [text for _, _, text in sorted(heap, key=lambda entry: entry[1])]


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, long ones in parts: SentencePiece skips what is longer than its maximum."""
    for text in texts:
        for start in range(0, len(text), _TRAINING_TEXT_BYTES):
            yield text[start : start + _TRAINING_TEXT_BYTES]


def _explained(error: RuntimeError, config: TokenizerConfig, size: int) -> Exception:
    """SentencePiece's own message as a sentence that says what to write; the error itself where it is none of the user's."""
    message = str(error)
    if found := re.search(r"set it to a value <= (\d+)", message):
        return BadInputError(
            f"tokenizer.vocab_size {config.vocab_size} is more than {size:,} bytes of text support: the largest that works is {found[1]}"
        )
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return BadInputError(
            f"tokenizer.vocab_size {config.vocab_size} is too small for the characters, bytes and special tokens of this text: "
            f"set it to more than {found[1]}, or lower tokenizer.character_coverage"
        )
    return error
