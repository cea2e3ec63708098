"""What a tokenizer is to the rest of the package, and how the one that a recipe names is opened."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from largeformer.artifact import write_atomically
from largeformer.config.data import TokenizerConfig
from largeformer.errors import BadInputError

logger = logging.getLogger(__name__)
SETTINGS = "tokenizer_config.json"
# Case, accents, blanks, other scripts: what a tokenizer may lose.
_PROBE = 'def f(x):\n    return "Grüße"  # 大型语言模型, e\u0301 \u00a0😀\n\n\tEnd. '
_ENDS = "eos_token_id"
_SAID = ("chat_template", "bos_token", "unk_token", "cls_token", "sep_token", "mask_token")


class Tokenizer(Protocol):
    """Text to ids and back. Ids of special tokens are never produced from text, and stand for no text when decoded. Picklable."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def pad(self) -> int:
        """The id that fills up a row, or -1 where the vocabulary has none. It never stands in text."""
        ...

    @property
    def unknown(self) -> int:
        """The id of what the vocabulary cannot spell, or -1 where it can spell everything."""
        ...

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """By this Megatron-core tells apart the indices that it caches; `sha256` is that of the tokenizer's file."""
        ...

    @property
    def piece_bytes(self) -> np.ndarray:
        """int32[vocab]: bytes of UTF-8 that each id stands for; 0 for special tokens. Over an encoded text they sum to its length."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`: int32[n]. On one thread: whoever has many texts has many processes."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` stand for; bytes that form no UTF-8 become U+FFFD. Raises IndexError for an id outside the vocabulary."""
        ...


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

    def encode_array(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(i) for i in ids)


def tokenizer_file(config: TokenizerConfig) -> str:
    """What the tokenizer's file is called in a prepare folder."""
    return "tokenizer.json" if config.type == "huggingface" else "tokenizer.model"


def copy_tokenizer(file: Path, to: Path) -> None:
    """The tokenizer's file, and what clients were told of it where it comes from (`said_of`)."""
    if said := said_of(file.parent):
        write_atomically(to.with_name(SETTINGS), (json.dumps(said, indent=2) + "\n").encode())
    write_atomically(to, file.read_bytes())  # last: where it is, all of it is


def said_of(folder: Path) -> dict[str, Any]:
    """What a folder says beside its tokenizer: how a chat is written (`chat_template`), what special tokens are called, and which ids end
    an answer (`eos_token_id`, a list: a chat may end otherwise than a document). Empty where there are none."""
    settings = json_in(folder / SETTINGS)
    content = {key: value.get("content") if isinstance(value, dict) else value for key, value in settings.items()}
    if (template := folder / "chat_template.jinja").is_file():
        content["chat_template"] = template.read_text()
    named = {key: value for key, value in content.items() if isinstance(value, str) and key in _SAID}
    ends = (_ids(json_in(folder / name).get(_ENDS)) for name in ("generation_config.json", "config.json", SETTINGS))
    first = next((ids for ids in ends if ids), [])
    return {**named, **({_ENDS: first} if first else {})}


def _ids(given: Any) -> list[int]:
    return [i for i in (given if isinstance(given, list) else [given]) if type(i) is int and i >= 0]


def json_in(path: Path) -> dict[str, Any]:
    """Empty where there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_tokenizer(path: Path, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer in `path`. Raises BadInputError where it is missing, broken, without the tokens that `config` names, or not of
    `config.vocab_size` ids, `config.unused_ids` among them."""
    tokenizer = tokenizer_of_any_size(path, config)
    if tokenizer.vocab_size != config.vocab_size:
        size = tokenizer.vocab_size
        counted = f" with {config.unused_ids} unused_ids" if config.unused_ids else ""
        raise BadInputError(f"tokenizer {path} has {size} ids{counted}, tokenizer.vocab_size says {config.vocab_size}: set it to {size}")
    return tokenizer


def tokenizer_of_any_size(path: Path, config: TokenizerConfig) -> Tokenizer:
    """As `load_tokenizer`, whatever `config.vocab_size` says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        kind = "tokenizer.json" if config.type == "huggingface" else "SentencePiece .model"
        raise BadInputError(f"tokenizer {path} cannot be read ({error.strerror}): give the path of a {kind} file") from error
    tokenizer = _open(content, path, config)
    if not is_exact(tokenizer):
        logger.warning("tokenizer %s changes text (case, blanks or rare characters): bits per byte will be approximate", path)
    return tokenizer


def _open(content: bytes, path: Path, config: TokenizerConfig) -> Tokenizer:
    if config.type == "huggingface":
        from largeformer.data.tokenization.huggingface import open_hugging_face

        return open_hugging_face(content, path, config)
    from largeformer.data.tokenization.sentencepiece import open_sentencepiece

    return open_sentencepiece(content, path, config)


def is_exact(tokenizer: Tokenizer) -> bool:
    """Whether text survives, and its bytes are counted, on a probe of what is easily lost; but for a space that is put in front of every
    text."""
    ids, counted = {}, {}
    for text in ("a", _PROBE):
        ids[text] = tokenizer.encode(text)
        counted[text] = int(tokenizer.piece_bytes[ids[text]].sum()) - len(text.encode("utf-8"))
    return tokenizer.decode(ids[_PROBE]) == _PROBE and counted["a"] == counted[_PROBE]


def missing_symbols(tokenizer: Tokenizer, symbols: Iterable[str]) -> list[str]:
    """Those of `symbols` that the tokenizer does not keep as single ids."""
    return [
        symbol for symbol in symbols if len(tokenizer.encode(f"a{symbol}b")) != len(tokenizer.encode("a")) + len(tokenizer.encode("b")) + 1
    ]
