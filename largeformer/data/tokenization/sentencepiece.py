"""SentencePiece, set up so that text survives: `decode(encode(text)) == text` for any text, with an exact byte count per id.

The text is not normalised, gets no space in front and keeps every blank; characters outside the vocabulary are spelled in bytes
(Kudo and Richardson 2018, arXiv:1808.06226; byte fallback as in Llama). One character is special: SentencePiece writes a space as
U+2581 and would read a real U+2581 as a space, so that one is always spelled in bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from largeformer.config.data import TokenizerConfig
from largeformer.errors import BadInputError

SPACE = "\u2581"


class SentencePieceTokenizer:
    """A SentencePiece model. `eod` and `pad` name its special tokens, unless they are the model's own `</s>` and `<pad>`; `unused` ids
    come after its own."""

    def __init__(self, model: bytes, eod: str | None = None, pad: str | None = None, unused: int = 0) -> None:
        self._model, self._named, self._unused = model, (eod, pad), unused
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # A model made elsewhere may put a space in front of a text; ours does not.
        self._adds_space = self._processor.encode("a", out_type=str)[0].startswith(SPACE)
        self._escaped_space = [] if self._adds_space else self._bytes_of(SPACE)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size()) + self._unused

    @property
    def eod(self) -> int:
        return self._special(self._named[0], self._processor.eos_id())

    @property
    def pad(self) -> int:
        return self._special(self._named[1], self._processor.pad_id())

    @property
    def unknown(self) -> int:
        return int(self._processor.unk_id())

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": type(self).__name__, "sha256": hashlib.sha256(self._model).hexdigest(), "eod": str(self.eod)}

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()  # type: ignore[no-any-return]

    def encode_array(self, text: str) -> np.ndarray:
        if self._escaped_space and SPACE in text:
            return self._encode_with_escapes(text)
        return self._ids(text)

    def decode(self, ids: Iterable[int]) -> str:
        pieces = self._pieces
        text = b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._adds_space else text

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int32)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._model, *self._named, self._unused)

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The UTF-8 that each id stands for."""
        return [self._piece(i) for i in range(self._processor.vocab_size())] + [b""] * self._unused

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

    def _ids(self, text: str) -> np.ndarray:
        return self._processor.encode(text, return_type="numpy")  # type: ignore[no-any-return]

    def _encode_with_escapes(self, text: str) -> np.ndarray:
        escape = np.array(self._escaped_space, dtype=np.int32)
        first, *others = text.split(SPACE)
        return np.concatenate([self._ids(first), *(ids for part in others for ids in (escape, self._ids(part)))])

    def _special(self, name: str | None, default: int) -> int:
        """The id of the special token `name`; -1 where the model has no such token, or has it as a piece of text."""
        if name is None:
            return int(default)
        token = self._processor.piece_to_id(name)
        return int(token) if self._processor.is_control(token) and self._processor.id_to_piece(token) == name else -1


def open_sentencepiece(content: bytes, path: Path, config: TokenizerConfig) -> SentencePieceTokenizer:
    """Raises BadInputError where `content` is no SentencePiece model, or has no token that could end a document."""
    try:
        tokenizer = SentencePieceTokenizer(content, config.eod_token, config.pad_token, config.unused_ids)
    except (RuntimeError, OSError, ValueError) as error:
        raise BadInputError(f"tokenizer {path} is not a SentencePiece model: give the .model file itself") from error
    if config.eod_token is not None and tokenizer.eod < 0:
        raise BadInputError(
            f"tokenizer {path} has no control symbol '{config.eod_token}', which tokenizer.eod_token names: give one that it has"
        )
    if tokenizer.eod < 0:
        raise BadInputError(
            f"tokenizer {path} has no end-of-sentence id (</s>), which ends every document: give a model that has one, "
            "or name another control symbol as tokenizer.eod_token"
        )
    if config.pad_token is not None and tokenizer.pad < 0:
        raise BadInputError(
            f"tokenizer {path} has no control symbol '{config.pad_token}', which tokenizer.pad_token names: give one that it has"
        )
    return tokenizer
