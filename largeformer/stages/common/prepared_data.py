"""What `prepare` has left, for the stages that read it: where it lies, its pairs and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact, file_sha256, identity_hash
from largeformer.config.schema import Recipe
from largeformer.data.reading.corpus import pair_name
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer, load_tokenizer, tokenizer_file
from largeformer.errors import BadInputError

KIND = "prepare"


def stage_folder(recipe: Recipe) -> Path:
    """Where the recipe's run keeps its prepared data."""
    return Path(recipe.run.output_dir) / KIND


def tokenizer_of(prepared: Artifact) -> dict[str, Any]:
    """For the metrics of a model's stage: by which tokenizer it reads."""
    return {key: prepared.metrics[key] for key in ("tokenizer_sha256",) if key in prepared.metrics}


class CutBy:
    """What a checkpoint keeps of the text that its model reads: the tokenizer, by another of which ids mean something else."""

    def __init__(self, prepared: Artifact) -> None:
        self._prepared = prepared

    def state_dict(self) -> dict[str, Any]:
        return tokenizer_of(self._prepared)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInputError where the text has been prepared anew, by another tokenizer."""
        trained, now = state.get("tokenizer_sha256"), self._prepared.metrics.get("tokenizer_sha256")
        if None not in (trained, now) and trained != now:
            raise BadInputError(
                f"the checkpoint to go on from reads by another tokenizer ({trained}) than {self._prepared.path} was cut by ({now}): "
                "prepare the text with the model's own (tokenizer.model), or move the checkpoints away to train anew"
            )


def content(prepared: Artifact) -> str:
    """A hash of the documents' lengths and the tokenizer: an identity is that of the recipe alone, and its sources may have changed."""
    lengths = {path.name: file_sha256(path) for path in sorted(prepared.path.glob("*.idx"))}
    return identity_hash({"lengths": lengths, "files": prepared.metrics.get("files"), **tokenizer_of(prepared)})


def prefixes(recipe: Recipe, folder: Path) -> list[tuple[Path, float]]:
    """Where each source's `.bin/.idx` pair is, and its weight."""
    return [(folder / pair_name(i, source.path), source.weight) for i, source in enumerate(recipe.data.sources)]


def open_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer in a prepare folder, checked against the recipe's vocabulary."""
    if recipe.data.is_mock:
        return MockTokenizer(recipe.tokenizer.vocab_size)
    return load_tokenizer(folder / tokenizer_file(recipe.tokenizer), recipe.tokenizer)
