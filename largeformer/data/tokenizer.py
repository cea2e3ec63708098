"""SentencePiece, set up so that text survives: `decode(encode(text)) == text` for any text, with an exact byte count per id.

The text is not normalised, gets no space in front and keeps every blank; characters outside the vocabulary are spelled in bytes
(Kudo and Richardson 2018, arXiv:1808.06226; byte fallback as in Llama). One character is special: SentencePiece writes a space as
U+2581 and would read a real U+2581 as a space, so that one is always spelled in bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from largeformer.artifact import write_atomically
from largeformer.config.data import TokenizerConfig
from largeformer.errors import BadInputError

SPACE = "\u2581"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", "[CLS]", "[SEP]")
# Unigram training sums over threads: the number is part of the result, so it must not follow the machine.
_TRAINING_THREADS = 4
_TRAINING_TEXT_BYTES = 32 * 1024


class Tokenizer:
    """A SentencePiece model. Ids of special tokens are never produced from text, and stand for no text when decoded."""

    def __init__(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # A model made elsewhere may put a space in front of a text; ours does not.
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        self._escaped_space = [] if self._adds_space else self._bytes_of(SPACE)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def eod(self) -> int:
        """The id that ends a document: `</s>`."""
        return int(self._processor.eos_id())

    @property
    def pad(self) -> int:
        """The id of `<pad>`, or -1 where the model has none. It never stands in text."""
        return int(self._processor.pad_id())

    @property
    def unknown(self) -> int:
        return int(self._processor.unk_id())

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """By this Megatron-core tells apart the indices that it caches."""
        return {"class": type(self).__name__, "sha256": hashlib.sha256(self._model).hexdigest()}

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        if self._escaped_space and any(SPACE in text for text in texts):
            return [self._encode_with_escapes(text) for text in texts]
        return self._processor.encode(list(texts), out_type=int)  # type: ignore[no-any-return]

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that form no UTF-8 become U+FFFD. Raises IndexError for an id outside the vocabulary."""
        pieces = self._pieces
        text = b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """int32[vocab]: bytes of UTF-8 that each id stands for; 0 for special tokens. Over an encoded text they sum to its length."""
        return np.array([len(piece) for piece in self._pieces], dtype=np.int32)

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self.__init__(model)  # type: ignore[misc]

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The UTF-8 that each id stands for."""
        return [self._piece(i) for i in range(self.vocab_size)]

    def _piece(self, token: int) -> bytes:
        processor = self._processor
        name = processor.id_to_piece(token)
        if processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token):
            return b""
        if processor.is_byte(token):
            return bytes([int(name[3:-1], 16)])
        return str(name).replace(SPACE, " ").encode("utf-8")

    def _bytes_of(self, character: str) -> list[int]:
        """The byte tokens of `character`; empty where the model has no byte fallback."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in character.encode("utf-8")]
        return ids if all(self._processor.is_byte(i) for i in ids) else []

    def _encode_with_escapes(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE)):
            ids += self._escaped_space if i else []
            ids += self._processor.encode(part, out_type=int)
        return ids


@dataclass(frozen=True)
class MockTokenizer:
    """Stands for a tokenizer where tokens are random: an id is taken for one byte, and decodes to its number."""

    vocab_size: int
    eod: int = 0
    pad: int = -1
    unknown: int = -1

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": type(self).__name__, "vocab_size": str(self.vocab_size)}

    @property
    def piece_bytes(self) -> np.ndarray:
        return np.ones(self.vocab_size, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        return [byte % self.vocab_size for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids)


def load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in `path`. Raises BadInputError where it is missing, broken, without `</s>`, or not of `vocab_size` ids."""
    try:
        model = path.read_bytes()
    except OSError as error:
        raise BadInputError(f"tokenizer {path} cannot be read ({error.strerror}): give the path of a SentencePiece .model file") from error
    try:
        tokenizer = Tokenizer(model)
    except (RuntimeError, OSError, ValueError) as error:
        raise BadInputError(f"tokenizer {path} is not a SentencePiece model: give the .model file itself") from error
    if tokenizer.vocab_size != vocab_size:
        size = tokenizer.vocab_size
        raise BadInputError(f"tokenizer {path} has {size} ids, tokenizer.vocab_size says {vocab_size}: set it to {size}")
    if tokenizer.eod < 0:
        raise BadInputError(f"tokenizer {path} has no end-of-sentence id (</s>), which ends every document: give a model that has one")
    return tokenizer


def sample_bytes(vocab_size: int) -> int:
    """Bytes of text that training a vocabulary reads: 2 KiB for each id, at least 8 MiB. More changes the pieces little."""
    return max(8 * 2**20, 2048 * vocab_size)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, path: Path, max_bytes: int | None = None) -> Tokenizer:
    """Train a model on a sample of `texts` of at most `max_bytes` (default `sample_bytes`), write it to `path` and return it.

    The same texts give the same file on any machine. Raises BadInputError where vocab_size does not suit the text.
    """
    sample = _sample(texts, max_bytes or sample_bytes(config.vocab_size))
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
            max_sentence_length=4 * _TRAINING_TEXT_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, config, sum(len(text.encode()) for text in sample)) from error
    write_atomically(path, model.getvalue())
    return Tokenizer(model.getvalue())


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
