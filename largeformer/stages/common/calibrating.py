"""The text that `prune` and `quantize` take their statistics from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from largeformer.artifact import Artifact
from largeformer.config.calibration import CalibrationConfig
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data
from largeformer.stages.common.weights import Source

if TYPE_CHECKING:
    from largeformer.data.tokenization.tokenizer import Tokenizer
    from largeformer.parallel.batch import Batch
    from largeformer.stages.common.world import World


def calibration(recipe: Recipe, world: World, source: Source, settings: CalibrationConfig) -> list[Batch]:
    """This data rank's batches, on its device. `recipe` is shaped like the model. Raises BadInputError where the text is empty, cannot be
    read, or was cut by another tokenizer."""
    at, layout = world.groups.coordinates, world.groups.layout
    return [batch.to(world.device) for batch in _batches(recipe, source, settings, at.data, layout.data)]


def check_calibration(recipe: Recipe, source: Source, settings: CalibrationConfig, data_size: int) -> None:
    """Raise what `calibration` would at so many data ranks. On one process."""
    _batches(recipe, source, settings, 0, data_size)


def _batches(recipe: Recipe, source: Source, settings: CalibrationConfig, data_rank: int, data_size: int) -> list[Batch]:
    from largeformer.data.calibration import calibration_batches
    from largeformer.data.loader import Reading
    from largeformer.data.packing import Packing

    tokenizer = prepared_data.open_tokenizer(recipe, source.prepared.path)
    reading = Reading(recipe.train.micro_batch_size, data_rank, data_size, Packing.of(recipe.data, tokenizer.eod))
    return calibration_batches(_streams(recipe, source, tokenizer, settings.text), recipe.model.seq_length, settings.samples, reading)


def _streams(recipe: Recipe, source: Source, tokenizer: Tokenizer, text: str | None) -> list[np.ndarray]:
    from largeformer.data.splits import held_out_streams

    if text is None:
        return held_out_streams(recipe.data, prepared_data.prefixes(recipe, source.prepared.path), tokenizer, "train", recipe.run.seed)
    path = Path(text)
    if path.is_dir():
        return _prepared_streams(path, recipe, source.prepared)
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"calibration.text {text} cannot be read ({error}): name a file of UTF-8 text, or a prepare folder") from None
    return [np.asarray(tokenizer.encode(content), dtype=np.int64)]


def _prepared_streams(folder: Path, recipe: Recipe, own: Artifact) -> list[np.ndarray]:
    """All ids of another run's prepare folder. Raises BadInputError where another tokenizer made them."""
    from largeformer.data.indexed import bin_path, open_indexed

    prepared = Artifact.read(folder)
    if prepared is None or prepared.kind != prepared_data.KIND:
        raise BadInputError(f"calibration.text {folder} is a folder that `prepare` has not finished: name one, or a file of text")
    theirs, ours = (artifact.metrics.get("tokenizer_sha256") for artifact in (prepared, own))
    if theirs != ours:
        raise BadInputError(
            f"calibration.text {folder} was cut by another tokenizer ({theirs}) than the model's ({ours}): prepare it with that one "
            "(tokenizer.model), or name a file of text"
        )
    datasets = [open_indexed(path.with_suffix(""), recipe.tokenizer.vocab_size) for path in sorted(folder.glob("*.idx"))]
    return [np.memmap(bin_path(Path(dataset.path_prefix)), dtype=dataset.index.dtype, mode="r") for dataset in datasets]
