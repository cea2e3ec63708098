"""What `prepare` has left, for the stages that read it: where it lies, its pairs and its tokenizer."""

from __future__ import annotations

from pathlib import Path

from largeformer.config.schema import Recipe
from largeformer.data.reading.corpus import pair_name
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer, load_tokenizer, tokenizer_file

KIND = "prepare"


def stage_folder(recipe: Recipe) -> Path:
    """Where the recipe's run keeps its prepared data."""
    return Path(recipe.run.output_dir) / KIND


def prefixes(recipe: Recipe, folder: Path) -> list[tuple[Path, float]]:
    """Where each source's `.bin/.idx` pair is, and its weight."""
    return [(folder / pair_name(i, source.path), source.weight) for i, source in enumerate(recipe.data.sources)]


def open_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer in a prepare folder, checked against the recipe's vocabulary."""
    if recipe.data.is_mock:
        return MockTokenizer(recipe.tokenizer.vocab_size)
    return load_tokenizer(folder / tokenizer_file(recipe.tokenizer), recipe.tokenizer)
