"""Rules between the keys of the section `tokenizer`. Sentences as in `checks.py`."""

from __future__ import annotations

from collections.abc import Iterator

from largeformer.config.data import TokenizerConfig

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", "[CLS]", "[SEP]")


def tokenizer_problems(tokenizer: TokenizerConfig) -> Iterator[str]:
    if tokenizer.type == "huggingface":
        if tokenizer.model is None:
            yield "tokenizer.type huggingface needs tokenizer.model, which is null: give the path of a tokenizer.json"
        if tokenizer.eod_token is None:
            yield "tokenizer.type huggingface needs tokenizer.eod_token, which is null: name what ends a document, as <|endoftext|>"
    if tokenizer.unused_ids and tokenizer.model is None:
        yield f"tokenizer.unused_ids is {tokenizer.unused_ids}, and a tokenizer that prepare trains has every id: remove it"
    for name in ("eod_token", "pad_token"):
        value = getattr(tokenizer, name)
        if value is not None and tokenizer.model is None and value not in SPECIAL_TOKENS:
            yield f"tokenizer.{name} '{value}' is not a special token of a trained model: one of {', '.join(SPECIAL_TOKENS)}"
    for symbol in tokenizer.user_symbols:
        if not symbol or any(character.isspace() or character == "\u2581" for character in symbol):
            yield f"tokenizer.user_symbols '{symbol}' is empty or holds a blank: write a symbol without, as <CODE>"
        elif symbol in SPECIAL_TOKENS:
            yield f"tokenizer.user_symbols '{symbol}' is a special token, which never stands in text: choose another"
        elif tokenizer.user_symbols.count(symbol) > 1:
            yield f"tokenizer.user_symbols names '{symbol}' twice: once is enough"
