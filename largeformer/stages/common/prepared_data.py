"""What `prepare` has left, for the stages that read it: where it lies, its pairs and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact, file_sha256, identity_hash
from largeformer.config.schema import Recipe
from largeformer.data.reading.corpus import pair_name
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer, load_tokenizer, said_of, tokenizer_file
from largeformer.errors import BadInputError

KIND = "prepare"


def stage_folder(recipe: Recipe) -> Path:
    """Where the recipe's run keeps its prepared data."""
    return Path(recipe.run.output_dir) / KIND


def tokenizer_of(prepared: Artifact) -> dict[str, Any]:
    """For the metrics of a model's stage: by which tokenizer it reads."""
    return {key: prepared.metrics[key] for key in ("tokenizer_sha256",) if key in prepared.metrics}


class CutBy:
    """What the checkpoints in `folder` keep of the text that their model reads: the tokenizer, by another of which ids mean something
    else."""

    def __init__(self, prepared: Artifact, folder: Path) -> None:
        self._prepared, self._folder = prepared, folder

    def state_dict(self) -> dict[str, Any]:
        return tokenizer_of(self._prepared)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises BadInputError where the text has been prepared anew, by another tokenizer."""
        if other := another_tokenizer(state, self._prepared):
            raise BadInputError(
                f"the checkpoints in {self._folder} read by {other}: put the text back as it was prepared, or move that folder away to "
                "train anew"
            )


def another_tokenizer(told: Mapping[str, Any], prepared: Artifact) -> str | None:
    """By what a model reads that cannot read `prepared`; None where it can, or nobody knows. told: `tokenizer_of` the model's own text."""
    theirs, ours = told.get("tokenizer_sha256"), prepared.metrics.get("tokenizer_sha256")
    return None if None in (theirs, ours) or theirs == ours else f"another tokenizer ({theirs}) than {prepared.path} was cut by ({ours})"


def content(prepared: Artifact) -> str:
    """A hash of the documents' lengths and the tokenizer: an identity is that of the recipe alone, and its sources may have changed."""
    lengths = {path.name: file_sha256(path) for path in sorted(prepared.path.glob("*.idx"))}
    return identity_hash({"lengths": lengths, "files": prepared.metrics.get("files"), **tokenizer_of(prepared)})


def prefixes(recipe: Recipe, folder: Path) -> list[tuple[Path, float]]:
    """Where each source's `.bin/.idx` pair is, and its weight. Raises BadInputError for an import, which brings no text."""
    artifact = Artifact.read(folder)
    if artifact is not None and artifact.kind == "import":
        raise BadInputError(
            f"{folder} is an import, which brings no text: prepare some, with largeformer prepare -c "
            f"{folder / 'config.yaml'} 'data.sources=[{{path: ...}}]'"
        )
    return [(folder / pair_name(i, source.path), source.weight) for i, source in enumerate(recipe.data.sources)]


def tokenizer_path(recipe: Recipe, folder: Path) -> Path:
    """The tokenizer's file in a prepare folder. Where the recipe names the same by its path, and it can be read there, that one: beside it
    stands what is said of chats now."""
    copy = folder / tokenizer_file(recipe.tokenizer)
    try:
        given = Path(recipe.tokenizer.model or "").expanduser()
        return given if given.is_file() and given.read_bytes() == copy.read_bytes() else copy
    except (OSError, RuntimeError):  # in a home that is not ours, or nobody's
        return copy


def answer_ends(recipe: Recipe, folder: Path) -> list[int]:
    """The ids that end an answer, beside the one that ends a document; empty where nobody has named any."""
    said = {} if recipe.data.is_mock else said_of(tokenizer_path(recipe, folder).parent)
    return [i for i in said.get("eos_token_id", []) if i < recipe.tokenizer.vocab_size]


def open_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer:
    """The tokenizer in a prepare folder, checked against the recipe's vocabulary."""
    if recipe.data.is_mock:
        return MockTokenizer(recipe.tokenizer.vocab_size)
    return load_tokenizer(folder / tokenizer_file(recipe.tokenizer), recipe.tokenizer)
