"""Hugging Face tokenizers beside transformers' own reading of the same file."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from largeformer.config.data import TokenizerConfig
from largeformer.data.tokenization.tokenizer import Tokenizer, load_tokenizer, missing_symbols
from largeformer.errors import BadInputError

EOD = "<|endoftext|>"
TEXTS = [f"def function_{i}(x):\n    return 'value {i}, naïve café 日本'\n" for i in range(200)]
ROUND_TRIPS = [
    "def f(x):\n    return x\n",
    "  two,  three   and a tail  ",
    "\n\r\n\n\t",
    "大型语言模型\uff0c训练工具。",
    "👩‍👩‍👧‍👦 😀 é e\u0301 \u00a0\u200b",
    f"named {EOD} and <pad> in text",
    "",
]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2 and Llama 3."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=[EOD, "<pad>"], initial_alphabet=alphabet))
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma: U+2581 for a space, `<0xNN>` for what is not in the vocabulary."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", EOD, "<pad>"]
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, special_tokens=special, limit_alphabet=40, max_token_length=8))
    definition = json.loads(made.to_str())
    vocabulary = definition["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    definition["model"]["byte_fallback"] = True
    return tokenizers.Tokenizer.from_str(json.dumps(definition))


def word_piece() -> tokenizers.Tokenizer:
    """As BERT: lower case, no accents, blanks lost."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", EOD, "[PAD]"]))
    return made


MADE = {"byte-level": byte_level, "byte fallback": byte_fallback, "WordPiece": word_piece}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, make in MADE.items():
        make().save(str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in MADE}


def opened(path: Path, **changes: object) -> Tokenizer:
    size = tokenizers.Tokenizer.from_file(str(path)).get_vocab_size()
    config = {"type": "huggingface", "model": str(path), "vocab_size": size, "eod_token": EOD, **changes}
    return load_tokenizer(path, TokenizerConfig.model_validate(config))


@pytest.mark.parametrize("text", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_text_survives_and_its_bytes_are_counted(paths: dict[str, Path], kind: str, text: str) -> None:
    tokenizer = opened(paths[kind], pad_token="<pad>")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.piece_bytes[ids].sum()) == len(text.encode())
    assert tokenizer.encode_array(text).tolist() == ids
    assert not {tokenizer.eod, tokenizer.pad, tokenizer.unknown} & set(ids)
    assert tokenizer.piece_bytes[[tokenizer.eod, tokenizer.pad]].tolist() == [0, 0]


@pytest.mark.parametrize("kind", MADE)
def test_ids_are_those_of_transformers(paths: dict[str, Path], kind: str) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(paths[kind]), eos_token=EOD)
    tokenizer = opened(paths[kind])
    for text in (TEXTS[3], ROUND_TRIPS[1], ROUND_TRIPS[3]):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert (tokenizer.eod, tokenizer.vocab_size) == (reference.eos_token_id, len(reference))
    assert tokenizer.decode([*tokenizer.encode("value"), tokenizer.eod]) == "value"


def test_padding_and_truncation_of_the_file_are_not_done(paths: dict[str, Path], tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(paths["byte-level"]))
    made.enable_truncation(5)
    made.enable_padding(length=40)
    made.save(str(tmp_path / "t.json"))
    assert opened(tmp_path / "t.json").encode(TEXTS[0]) == opened(paths["byte-level"]).encode(TEXTS[0])


def test_what_changes_text_is_said(paths: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    opened(paths["byte-level"])
    opened(paths["byte fallback"])
    assert caplog.text == ""
    tokenizer = opened(paths["WordPiece"])
    assert "bits per byte will be approximate" in caplog.text
    assert tokenizer.unknown == 0 and tokenizer.encode("\u2603") == [0]


def test_a_tokenizer_survives_pickling(paths: dict[str, Path]) -> None:
    tokenizer = opened(paths["byte-level"])
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) and copy.unique_identifiers == tokenizer.unique_identifiers


def test_ids_that_the_model_alone_has_stand_for_no_text(paths: dict[str, Path]) -> None:
    """As in Qwen2, whose embedding has more rows than its tokenizer ids."""
    tokenizer, own = opened(paths["byte-level"], vocab_size=512, unused_ids=112), opened(paths["byte-level"])
    assert (own.vocab_size, tokenizer.vocab_size, len(tokenizer.piece_bytes)) == (400, 512, 512)
    assert not tokenizer.piece_bytes[400:].any()
    assert tokenizer.decode([*tokenizer.encode("value"), 400, 511]) == "value"
    assert tokenizer.encode(TEXTS[0]) == own.encode(TEXTS[0]) and tokenizer.unique_identifiers == own.unique_identifiers
    assert pickle.loads(pickle.dumps(tokenizer)).vocab_size == 512
    with pytest.raises(IndexError, match="id 512 is outside the vocabulary of 512"):
        tokenizer.decode([512])


def test_symbols_that_are_no_single_ids_are_found(paths: dict[str, Path]) -> None:
    assert missing_symbols(opened(paths["byte-level"]), ["<URL>", "x"]) == ["<URL>"]


BAD = {
    "no such end": ({"eod_token": "</s>"}, "has no token '</s>', which tokenizer.eod_token names .*<|endoftext|>"),
    "no such padding": ({"pad_token": "[PAD]"}, "tokenizer.pad_token"),
    "another size": ({"vocab_size": 512}, r"has 400 ids, tokenizer\.vocab_size says 512: set it to 400"),
    "too few unused": (
        {"vocab_size": 512, "unused_ids": 100},
        r"has 500 ids with 100 unused_ids, tokenizer\.vocab_size says 512",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_bad_input(paths: dict[str, Path], changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        opened(paths["byte-level"], **changes)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'], ids=["empty", "no model", "no text", "no vocabulary"]
)
def test_what_is_no_tokenizer_is_bad_input(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    config = TokenizerConfig(type="huggingface", model=str(path), vocab_size=400, eod_token=EOD)
    with pytest.raises(BadInputError, match=r"tokenizer\.json is not a Hugging Face tokenizer\.json"):
        load_tokenizer(path, config)
