"""A SentencePiece model as the JSON of Hugging Face's tokenizers, which gives the same ids.

What a usual conversion loses is kept: text is not normalised, a real U+2581 is not a space (it is spelled in bytes), and the
name of a special token in a text is text. In the JSON the pieces hold plain spaces, not U+2581, so nothing has to be replaced
back and forth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largeformer.artifact import write_atomically
from largeformer.config.data import TokenizerConfig
from largeformer.data.tokenization.sentencepiece import SPACE
from largeformer.data.tokenization.tokenizer import said_of
from largeformer.errors import BadInputError

_SPECIAL = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
}


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: str  # normal, unknown, control, user, byte, unused


_KINDS = {1: "normal", 2: "unknown", 3: "control", 4: "user", 5: "unused", 6: "byte"}


def write_tokenizer(file: Path, config: TokenizerConfig, max_length: int, folder: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json`, and a SentencePiece model itself, for clients that read that.

    file: the tokenizer of the run, as `config` says. max_length: the model's positions. Raises BadInputError for a SentencePiece model that
    the JSON cannot stand for.
    """
    content, said = file.read_bytes(), said_of(file.parent)
    if config.type == "huggingface":
        from tokenizers import Tokenizer

        write_atomically(folder / "tokenizer.json", content)
        known = Tokenizer.from_str(content.decode())
        named = {key: text for key, text in said.items() if key.endswith("_token") and known.token_to_id(text) is not None}
    else:
        proto = _read(content)
        pieces = [_Piece(piece.piece, piece.score, _KINDS[piece.type]) for piece in proto.pieces]
        _backend(proto, pieces).save(str(folder / "tokenizer.json"))
        write_atomically(folder / "tokenizer.model", content)
        present = {piece.text for piece in pieces if piece.kind in ("control", "unknown")}
        named = {key: text for key, text in _SPECIAL.items() if text in present}
    given = {"eos_token": config.eod_token, "pad_token": config.pad_token}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        **{key: text for key, text in given.items() if text is not None},
        **{key: text for key, text in said.items() if key == "chat_template"},
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # `<s>` in a text is three characters; but a chat template writes the names of special tokens into a text.
        "split_special_tokens": "chat_template" not in said,
    }
    write_atomically(folder / "tokenizer_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def _read(content: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(content)
    return proto


def _backend(proto: Any, pieces: Sequence[_Piece]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(_model(proto, pieces))
    steps = _normalizers(proto.normalizer_spec, spells_bytes=any(piece.kind == "byte" for piece in pieces))
    if steps is not None:
        tokenizer.normalizer = steps
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_names(pieces)), "merged_with_previous")
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), *prefix])
    tokenizer.add_special_tokens([AddedToken(piece.text, special=True, normalized=False) for piece in pieces if piece.kind == "control"])
    tokenizer.add_tokens([AddedToken(_spaced(piece), special=False, normalized=False) for piece in pieces if piece.kind == "user"])
    return tokenizer


def _model(proto: Any, pieces: Sequence[_Piece]) -> Any:
    from tokenizers import models

    kind, unknown = proto.trainer_spec.model_type, proto.trainer_spec.unk_id
    byte_fallback = any(piece.kind == "byte" for piece in pieces)
    if kind == proto.trainer_spec.BPE:
        vocabulary = {_spaced(piece): number for number, piece in enumerate(pieces)}
        merges = _merges(pieces)
        name = pieces[unknown].text
        return models.BPE(vocabulary, merges, unk_token=name, fuse_unk=True, byte_fallback=byte_fallback)
    if kind == proto.trainer_spec.UNIGRAM:
        # What is no text has the lowest score: a lower one would make unknown characters dearer than SentencePiece makes them.
        lowest = min(piece.score for piece in pieces if piece.kind == "normal")
        scored = [(_spaced(piece), piece.score if piece.kind in ("normal", "user") else lowest) for piece in pieces]
        return models.Unigram(scored, unk_id=unknown, byte_fallback=byte_fallback)
    raise BadInputError("the tokenizer's model type is neither bpe nor unigram: Hugging Face's tokenizers have no other of SentencePiece's")


def _names(pieces: Sequence[_Piece]) -> str:
    """A pattern for the first character of every name of a piece that is no text.

    A Unigram model of theirs looks for all of its pieces in a text, `<s>` as well; a cut after the first character hides them.
    """
    named = [piece.text for piece in pieces if piece.kind in ("control", "unknown", "byte", "unused") and len(piece.text) > 1]
    return "|".join(f"{re.escape(first)}(?=(?:{'|'.join(rests)}))" for first, rests in _by_first_character(named).items())


def _by_first_character(names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name[0], []).append(re.escape(name[1:]))
    return found


def _merges(pieces: Sequence[_Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece prefers them: by the made piece's score."""
    texts = {_spaced(piece): piece.score for piece in pieces if piece.kind in ("normal", "user")}
    made: list[tuple[float, int, tuple[str, str]]] = []
    for text, score in texts.items():
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in texts and text[i:] in texts]
        made += [(-score, len(made) + number, pair) for number, pair in enumerate(pairs)]
    return [pair for _, _, pair in sorted(made)]


def _spaced(piece: _Piece) -> str:
    return piece.text.replace(SPACE, " ") if piece.kind in ("normal", "user", "unused") else piece.text


def _normalizers(spec: Any, spells_bytes: bool) -> Any:
    """What is done to a text first: nothing with our own models, more with those made elsewhere. On U+2581 see `data/tokenization`."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.add_dummy_prefix or not spells_bytes:
        steps.append(normalizers.Replace(SPACE, " "))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None
