"""A Hugging Face `tokenizer.json`, through the library that it is made for.

The file says how text is cut, not which token ends a document: `tokenizer.eod_token` does. Names of special tokens are text where
they stand in text. What an id stands for is told by its kind of vocabulary: byte-level BPE writes each byte as one character (GPT-2's
table); others write a space as U+2581 and a byte as `<0xNN>`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from largeformer.config.data import TokenizerConfig
from largeformer.errors import BadInputError

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"


class HuggingFaceTokenizer:
    """`definition` is the content of a tokenizer.json; `eod` and `pad` are names of its tokens; `unused` ids come after its own."""

    def __init__(self, definition: bytes, eod: str, pad: str | None = None, unused: int = 0) -> None:
        from tokenizers import Tokenizer as Library

        self._definition, self._named, self._unused = definition, (eod, pad), unused
        self._library = Library.from_str(definition.decode("utf-8"))
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        self._raw: dict[str, Any] = json.loads(definition)

    @cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._library.get_vocab(with_added_tokens=True).values()) + self._unused

    @property
    def eod(self) -> int:
        return self._id(self._named[0])

    @property
    def pad(self) -> int:
        return self._id(self._named[1])

    @cached_property
    def unknown(self) -> int:
        model = self._raw["model"]
        if isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        return self._id(model.get("unk_token"))

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": type(self).__name__, "sha256": hashlib.sha256(self._definition).hexdigest(), "eod": str(self.eod)}

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids  # type: ignore[no-any-return]

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(ids)
        if beyond := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise IndexError(f"id {beyond[0]} is outside the vocabulary of {self.vocab_size}")
        return self._library.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        added = {token["id"]: token for token in self._raw.get("added_tokens", [])}
        byte_level = any('"ByteLevel"' in json.dumps(self._raw.get(part)) for part in ("pre_tokenizer", "decoder"))
        for piece, i in self._library.get_vocab(with_added_tokens=True).items():
            if i in added:
                sizes[i] = 0 if added[i].get("special") else len(added[i]["content"].encode("utf-8"))
            elif i != self.unknown:
                sizes[i] = len(piece) if byte_level else _spelled_bytes(piece)
        return sizes

    def has(self, token: str) -> bool:
        return self._library.token_to_id(token) is not None

    def special_tokens(self) -> list[str]:
        return [token["content"] for token in self._raw.get("added_tokens", []) if token.get("special")]

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._definition, *self._named, self._unused)

    def _id(self, token: str | None) -> int:
        found = self._library.token_to_id(token) if token is not None else None
        return int(found) if found is not None else -1


def _spelled_bytes(piece: str) -> int:
    """Bytes of a piece of a vocabulary that is not byte-level; `##` marks that a word goes on."""
    if _BYTE.fullmatch(piece):
        return 1
    return len(piece.removeprefix("##").replace(_SPACE, " ").encode("utf-8"))


def open_hugging_face(content: bytes, path: Path, config: TokenizerConfig) -> HuggingFaceTokenizer:
    """Raises BadInputError where `content` is no tokenizer.json, the library is missing, or the tokens named are not in it."""
    assert config.eod_token is not None  # config/tokenizer_rules.py
    try:
        tokenizer = HuggingFaceTokenizer(content, config.eod_token, config.pad_token, config.unused_ids)
    except ImportError:
        raise BadInputError("tokenizer.type huggingface needs the package tokenizers: pip install 'largeformer[data]'") from None
    except Exception as error:  # The library raises bare Exceptions.
        raise BadInputError(f"tokenizer {path} is not a Hugging Face tokenizer.json ({error}): give that file itself") from error
    for name in ("eod_token", "pad_token"):
        token = getattr(config, name)
        if token is not None and not tokenizer.has(token):
            known = ", ".join(tokenizer.special_tokens()[:8]) or "none"
            raise BadInputError(f"tokenizer {path} has no token '{token}', which tokenizer.{name} names (its special tokens: {known})")
    return tokenizer
