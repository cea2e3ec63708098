"""The exported tokenizer gives the ids of ours."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from largeformer.config.data import TokenizerConfig
from largeformer.data.tokenization.sentencepiece import SentencePieceTokenizer as Tokenizer
from largeformer.data.tokenization.training import train_tokenizer
from largeformer.errors import BadInputError
from largeformer.export.clients import tokenizer_ids
from largeformer.export.tokenizer import write_tokenizer
from tests.data.tokenization.test_tokenizer import ROUND_TRIPS, TEXTS, foreign_model

transformers = pytest.importorskip("transformers")
SENTENCES = [
    *ROUND_TRIPS.values(),
    *TEXTS[:20],
    "日本語と English, mixed\n\n\t  <s>▁▁</s> ①",
    "   \n" * 50,
    "aaaaaaaaaaaaaaaa abababababab",
]


def exported(model: bytes, folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "given.model").write_bytes(model)
    write_tokenizer(folder / "given.model", TokenizerConfig(vocab_size=1), 64, folder)
    return folder


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_ids_are_ours(tmp_path: Path, model_type: str, byte_fallback: bool) -> None:
    config = TokenizerConfig.model_validate({"vocab_size": 400, "model_type": model_type, "byte_fallback": byte_fallback})
    train_tokenizer([*TEXTS, *SENTENCES], config, tmp_path / "tokenizer")
    model = (tmp_path / "tokenizer").read_bytes()
    ours = Tokenizer(model)
    folder = exported(model, tmp_path)
    assert tokenizer_ids(folder, SENTENCES) == list(map(ours.encode, SENTENCES))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id, len(theirs)) == (ours.eod, ours.pad, ours.unknown, 400)
    assert theirs(SENTENCES[0]).input_ids == ours.encode(SENTENCES[0]), "nothing is put in front or behind by default"
    for text in SENTENCES:
        ids = ours.encode(text)
        if ours.unknown not in ids:
            assert theirs.decode(ids) == ours.decode(ids)
        assert theirs.decode([ours.eod, *ids], skip_special_tokens=True) == ours.decode(ids)


def test_symbols_of_the_user_stay_whole(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["<url>", "<e-mail>"],
        minloglevel=2,
    )
    texts = ["see <url> and <e-mail>", "<url><url>x", "< url>"]
    assert tokenizer_ids(exported(model.getvalue(), tmp_path), texts) == list(map(Tokenizer(model.getvalue()).encode, texts))


def test_a_model_made_elsewhere_keeps_its_space_in_front(tmp_path: Path) -> None:
    model = foreign_model(add_dummy_prefix=True)  # and SentencePiece's own normalisation
    texts = ["a b", "  two  blanks ", "\uff21\u00a0①", "café", *TEXTS[:3]]
    folder = exported(model, tmp_path)
    assert tokenizer_ids(folder, texts) == list(map(Tokenizer(model).encode, texts))
    assert transformers.AutoTokenizer.from_pretrained(folder).decode(Tokenizer(model).encode("a b")) == "a b"


def test_a_kind_of_model_that_the_json_does_not_know_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=80, model_type="char", minloglevel=2, hard_vocab_limit=False
    )
    with pytest.raises(BadInputError, match="neither bpe nor unigram"):
        exported(model.getvalue(), tmp_path)
