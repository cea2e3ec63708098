"""The recipe's sections `tokenizer` and `data`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from largeformer.config.augment import AugmentConfig
from largeformer.config.cleaning import CleaningStep, DeduplicateConfig
from largeformer.config.sampling import RandomSampling, SamplingConfig
from largeformer.config.section import Positive, PositiveInt, Section

READING = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss", "sampling", "augment")
"""Keys of `data` that say how prepared text is trained on, not what it is."""


class TokenizerConfig(Section):
    """A SentencePiece model, trained by `prepare` or read from `model`; or a Hugging Face `tokenizer.json`, always read from `model`.

    `vocab_size` is stated either way, so that `plan` and `--dry-run` need no tokenizer; a tokenizer of another size is refused when it
    is opened. `unused_ids`: how many of them the tokenizer does not have, where a model that was made elsewhere has more rows than its
    tokenizer ids; no text has them. `eod_token` ends every document: `</s>` unless given, and always given for a Hugging Face tokenizer,
    whose file does not say. `user_symbols` become single ids wherever they stand in text. Training reads a sample of at most
    `sample_bytes`.
    """

    type: Literal["sentencepiece", "huggingface"] = "sentencepiece"
    model_type: Literal["bpe", "unigram"] = "bpe"
    vocab_size: PositiveInt
    model: str | None = None
    character_coverage: Annotated[float, Field(gt=0.9, le=1.0)] = 0.9995
    byte_fallback: bool = True
    user_symbols: tuple[str, ...] = ()
    sample_bytes: PositiveInt | None = None
    eod_token: str | None = None
    pad_token: str | None = None
    unused_ids: Annotated[int, Field(ge=0)] = 0

    def identity(self) -> dict[str, Any]:
        """For `Recipe.identity`."""
        return self.model_dump(mode="json", exclude=set() if self.unused_ids else {"unused_ids"})


class SourceConfig(Section):
    """One source of text: a file, a folder, a glob, or the built-in corpus `python-docs`; `mock` makes random tokens. Or a Megatron
    pair, by its `.bin`, its `.idx` or their common name.

    `text_key`: the field that holds the text in JSON lines. `split`: this source's own shares of train, valid and test instead of
    `data.split`; "0,1,0" keeps it for validation.
    """

    path: str
    weight: Positive = 1.0
    text_key: Annotated[str, Field(min_length=1)] = "text"
    split: str | None = None


class DataConfig(Section):
    """Text, and how batches are made of it. `num_workers`: loading processes; 0 is a thread that runs ahead.

    Samples are documents joined and cut, so that one may hold several. `reset_attention_mask`: no attention across them;
    `reset_position_ids`: learned positions begin anew in each; `eod_mask_loss`: what follows the end of a document does not count.
    """

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)] = (SourceConfig(path="python-docs"),)
    split: str = "96,2,2"
    quarantine_threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    cleaning: tuple[CleaningStep, ...] = ()
    deduplicate: DeduplicateConfig | None = None
    augment: AugmentConfig | None = None
    max_document_bytes: Annotated[int, Field(ge=2**15, le=2**30)] = 2**23
    prepare_workers: PositiveInt | None = None
    num_workers: Annotated[int, Field(ge=0)] = 0
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False
    sampling: SamplingConfig = RandomSampling()

    @property
    def is_mock(self) -> bool:
        return any(source.path == "mock" for source in self.sources)

    @property
    def splits(self) -> tuple[str, ...]:
        """The shares of train, valid and test of each source."""
        return tuple(source.split or self.split for source in self.sources)
