from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from largeformer.config.data import TokenizerConfig
from largeformer.config.tokenizer_rules import SPECIAL_TOKENS
from largeformer.data.tokenization.sentencepiece import SentencePieceTokenizer
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer, load_tokenizer, missing_symbols
from largeformer.data.tokenization.training import _sample, train_tokenizer
from largeformer.errors import BadInputError

TEXTS = [
    f"def function_{i}(argument: int) -> str:\n    if argument > {i}:\n        return 'value {i}'\n\n    naïve = \"café\"\n"
    for i in range(300)
]
CONFIG = TokenizerConfig(vocab_size=400)

ROUND_TRIPS = {
    "code": "def f(x):\n    return x\n",
    "blanks kept": "  two,  three   and a tail  ",
    "only blanks": "     ",
    "line ends": "\n\r\n\n\n \r",
    "tabs": "\tif x:\n\t\treturn",
    "Chinese": "大型语言模型\uff0c训练工具。",
    "emoji": "👩‍👩‍👧‍👦 😀🇫🇷",
    "combining": "é e\u0301 ﬁ Å",
    "not normalised": "\u00a0\uff21\uff22\uff23①\u3000\u200b\ufeff",
    "control characters": "a\x00b\x01\x7f\x1b[0m",
    "names of special tokens": "<s> </s> <pad> <mask> [CLS] [SEP] <unk> <0x41>",
    "SentencePiece's own space": "▁a ▁▁ b▁",
    "SentencePiece's own unknown": "▅ ⁇ \u2047",
    "astral": "\U0001f9ff\U00012345\U0010ffff",
    "empty": "",
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(TEXTS, CONFIG, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_path: Path) -> Tokenizer:
    return load_tokenizer(model_path, CONFIG)


@pytest.mark.parametrize("text", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_text_survives_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.piece_bytes[ids].sum()) == len(text.encode("utf-8"))
    assert tokenizer.unknown not in ids
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.encode_array(text).tolist() == ids


def test_encoding_is_sentencepieces_own(tokenizer: Tokenizer, model_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    for text in (TEXTS[7], ROUND_TRIPS["Chinese"], ROUND_TRIPS["blanks kept"]):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert len(tokenizer.encode(TEXTS[7])) < len(TEXTS[7]) / 3  # pieces, not bytes


def test_special_tokens_have_fixed_ids_and_stand_for_no_text(tokenizer: Tokenizer, model_path: Path) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    assert [reference.id_to_piece(i) for i in range(len(SPECIAL_TOKENS))] == list(SPECIAL_TOKENS)
    assert (tokenizer.unknown, tokenizer.eod, tokenizer.pad) == (0, 2, 3)
    assert tokenizer.piece_bytes[: len(SPECIAL_TOKENS)].tolist() == [0] * len(SPECIAL_TOKENS)
    assert tokenizer.piece_bytes.shape == (400,) and tokenizer.piece_bytes[len(SPECIAL_TOKENS) :].min() == 1
    assert tokenizer.decode([2, *tokenizer.encode("a"), 3]) == "a"


def test_half_a_character_decodes_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("日")[:2]) == "\ufffd"


def test_a_tokenizer_survives_pickling(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert copy.unique_identifiers == tokenizer.unique_identifiers


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_twice_gives_the_same_file(tmp_path: Path, model_type: str) -> None:
    config = TokenizerConfig.model_validate({"vocab_size": 330, "model_type": model_type})
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), config, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "pattern"),
    [
        pytest.param(5000, r"vocab_size 5000 is more than .* bytes of text support: the largest that works is (\d+)", id="too large"),
        pytest.param(100, r"vocab_size 100 is too small .* set it to more than (\d+)", id="too small"),
    ],
)
def test_a_vocabulary_that_does_not_suit_the_text_is_bad_input(tmp_path: Path, vocab_size: int, pattern: str) -> None:
    with pytest.raises(BadInputError, match=pattern) as caught:
        train_tokenizer(TEXTS, TokenizerConfig(vocab_size=vocab_size), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    # The size that the message names does work.
    found = re.search(pattern, str(caught.value))
    assert found is not None
    size = int(found[1]) + (vocab_size == 100)
    assert train_tokenizer(TEXTS, TokenizerConfig(vocab_size=size), tmp_path / "model").vocab_size == size


def test_no_text_at_all_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no text"):
        train_tokenizer([], CONFIG, tmp_path / "model")


def test_the_sample_is_bounded_and_spread_over_the_whole() -> None:
    texts = [f"{i:05d}" * 20 for i in range(2000)]  # 100 bytes each
    sample = _sample(iter(texts), 20_000)
    assert sum(map(len, sample)) <= 20_000 and len(sample) == 200
    positions = [int(text[:5]) for text in sample]
    assert positions == sorted(positions)
    # Each quarter holds 50 on average; 3 standard deviations are 18.
    assert all(32 <= sum(quarter * 500 <= p < quarter * 500 + 500 for p in positions) <= 68 for quarter in range(4))
    assert _sample(iter(texts), 10**6) == texts


def test_another_size_is_refused(model_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"has 400 ids, tokenizer\.vocab_size says 512: set it to 400"):
        load_tokenizer(model_path, TokenizerConfig(vocab_size=512))


def test_ids_that_the_model_alone_has_stand_for_no_text(model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path, TokenizerConfig(vocab_size=512, model=str(model_path), unused_ids=112))
    copy = pickle.loads(pickle.dumps(tokenizer))
    for one in (tokenizer, copy):
        assert (one.vocab_size, len(one.piece_bytes), one.piece_bytes[400:].any()) == (512, 512, False)
        assert one.decode([*one.encode("value"), 400, 511]) == "value"


@pytest.mark.parametrize("content", [None, b"", b"not a model", b"\x0a\x05hello"], ids=["absent", "empty", "text", "another message"])
def test_what_is_no_model_is_bad_input(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(BadInputError, match=r"x\.model"):
        load_tokenizer(tmp_path / "x.model", CONFIG)


def foreign_model(**options: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_made_elsewhere_puts_its_space_in_front_and_takes_it_away() -> None:
    tokenizer = SentencePieceTokenizer(
        foreign_model(add_dummy_prefix=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
    )
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    assert tokenizer.pad == -1


LOSSY = "bits per byte will be approximate"
KEEPS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param({**KEEPS, "add_dummy_prefix": False}, False, id="as we train them"),
        pytest.param({**KEEPS, "add_dummy_prefix": True}, False, id="a space in front, as Llama's"),
        pytest.param({}, True, id="SentencePiece's defaults"),
        pytest.param({**KEEPS, "normalization_rule_name": "nmt_nfkc_cf"}, True, id="lower case"),
    ],
)
def test_a_model_that_changes_text_is_told(options: dict[str, Any], said: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.model").write_bytes(foreign_model(**options))
    load_tokenizer(tmp_path / "x.model", TokenizerConfig(vocab_size=330))
    assert (LOSSY in caplog.text) is said


def test_a_model_without_an_end_of_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(foreign_model(eos_id=-1))
    with pytest.raises(BadInputError, match="no end-of-sentence id"):
        load_tokenizer(tmp_path / "x.model", TokenizerConfig(vocab_size=330))


def test_another_control_symbol_may_end_documents(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(foreign_model(eos_id=-1, control_symbols=["<eot>", "<fill>"]))
    tokenizer = load_tokenizer(tmp_path / "x.model", TokenizerConfig(vocab_size=330, model="x", eod_token="<eot>", pad_token="<fill>"))
    assert (tokenizer.decode([tokenizer.eod]), tokenizer.pad) == ("", tokenizer.eod + 1)
    assert pickle.loads(pickle.dumps(tokenizer)).eod == tokenizer.eod
    with pytest.raises(BadInputError, match="no control symbol 'def'"):  # a piece of text is none
        load_tokenizer(tmp_path / "x.model", TokenizerConfig(vocab_size=330, model="x", eod_token="def"))


def test_user_symbols_are_single_ids_in_text_and_are_text(tmp_path: Path) -> None:
    config = TokenizerConfig(vocab_size=340, user_symbols=("<CODE>", "<URL>"))
    tokenizer = train_tokenizer(TEXTS, config, tmp_path / "model", symbols=("<URL>", "<NUM>"))
    text = "see <URL>, <NUM>字<CODE><CODE>"
    ids = tokenizer.encode(text)
    first = len(SPECIAL_TOKENS)
    assert [i for i in ids if first <= i < first + 3] == [first + 1, first + 2, first, first]
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.piece_bytes[ids].sum()) == len(text.encode())
    assert missing_symbols(tokenizer, ["<CODE>", "<URL>", "<NUM>", "<EMAIL>", "zqx"]) == ["<EMAIL>", "zqx"]


def test_training_reads_no_more_than_it_may(tmp_path: Path) -> None:
    texts = iter(TEXTS * 5)
    small = train_tokenizer(texts, TokenizerConfig(vocab_size=330, sample_bytes=20_000), tmp_path / "a")
    assert next(texts, None) is None  # the sample is spread over all of it
    assert small.encode("def function_1") != []
    with pytest.raises(BadInputError, match=r"more than \d\d\d bytes of text"):
        train_tokenizer(TEXTS, TokenizerConfig(vocab_size=2000, sample_bytes=200), tmp_path / "b")


def test_random_tokens_stand_for_a_byte_each() -> None:
    mock = MockTokenizer(250)
    assert mock.piece_bytes.tolist() == [1] * 250
    assert mock.decode([3, 249]) == "3 249"
    assert max(mock.encode("\U0010ffff")) < 250
