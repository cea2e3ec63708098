"""The loss of a model that is in memory on a split of its run's data, every token predicted once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from largeformer.artifact import Artifact
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError, StageFailed
from largeformer.stages.common import prepared_data
from largeformer.stages.common.weights import Source
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.evaluation.perplexity import LossTotal
    from largeformer.models.gpt import GPT


def check_held_out(recipe: Recipe, prepared: Artifact, split: Literal["valid", "test"]) -> None:
    """Raise BadInputError where the prepared data has no such split."""
    from largeformer.data.splits import held_out_streams

    tokenizer = prepared_data.open_tokenizer(recipe, prepared.path)
    held_out_streams(recipe.data, prepared_data.prefixes(recipe, prepared.path), tokenizer, split, recipe.run.seed)


def held_out_loss(recipe: Recipe, world: World, source: Source, chunks: Sequence[GPT], split: Literal["valid", "test"]) -> LossTotal:
    """Collective; alike on every rank. `recipe` is shaped like the model. Raises BadInputError where another tokenizer cut the data."""
    from largeformer.data.indexed import check_tokenizer
    from largeformer.data.loader import Reading, evaluation_windows
    from largeformer.data.packing import Packing
    from largeformer.data.splits import held_out_streams
    from largeformer.evaluation.perplexity import evaluate

    folder = source.prepared.path
    tokenizer = prepared_data.open_tokenizer(recipe, folder)
    check_tokenizer(tokenizer.unique_identifiers, source.prepared.metrics, folder)
    streams = held_out_streams(recipe.data, prepared_data.prefixes(recipe, folder), tokenizer, split, recipe.run.seed)
    packing = Packing.of(recipe.data, tokenizer.eod)
    reading = Reading(recipe.train.micro_batch_size, world.groups.coordinates.data, world.groups.layout.data, packing)
    windows = evaluation_windows(streams, recipe.model.seq_length, reading, tokenizer.eod)
    return evaluate(chunks, ([batch] for batch in windows), world.groups, tokenizer.piece_bytes)


def check_sound(loss: LossTotal, checkpoint: Path) -> None:
    """Raise BadInputError where the loss of the model that a stage was given is not finite."""
    if not math.isfinite(loss.loss):
        raise BadInputError(
            f"the loss of {checkpoint} on held-out text is {loss.loss}: its weights or activations are not finite; begin with a sound "
            "checkpoint, or with a train.precision of a wider range"
        )


def held_out_figures(before: LossTotal, after: LossTotal) -> dict[str, Any]:
    """For the manifest of a stage that changes a model: what it was, and what it is. Raises StageFailed where it is not finite."""
    if not math.isfinite(after.loss):
        raise StageFailed([f"the loss of the model that was made is {after.loss}: its weights or activations are not finite"])
    return {
        "split": "valid",
        "loss_before": before.loss,
        "loss": after.loss,
        "perplexity_before": before.perplexity,
        "perplexity": after.perplexity,
        "bits_per_byte_before": before.bits_per_byte,
        "bits_per_byte": after.bits_per_byte,
        "perplexity_increase": after.perplexity / before.perplexity - 1 if before.perplexity else 0.0,
    }
