"""`prune` by width or depth: measure what each part is worth, and cut the weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import write_atomically
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.stages.common.held_out import check_sound, held_out_figures, held_out_loss
from largeformer.stages.common.inputs import Input
from largeformer.stages.common.weights import load_model
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    import torch

    from largeformer.compression.pruning.importance import Importance
    from largeformer.compression.pruning.structured import Kept
    from largeformer.evaluation.perplexity import LossTotal
    from largeformer.export.streaming import StoredTensors
    from largeformer.parallel.batch import Batch


def smaller(given: Input, written: Recipe, world: World, begin: Callable[[], None]) -> dict[str, Any]:
    """The metrics of the model that is left. `written`: the recipe with its shape. `begin` takes the folder, once nothing is refused."""
    from largeformer.compression.pruning.shape import narrowed
    from largeformer.compression.pruning.structured import choose, new_names, sources
    from largeformer.export.streaming import StoredTensors
    from largeformer.models.gpt import build_gpt
    from largeformer.stages.common.calibrating import calibration
    from largeformer.training.checkpointing import load_weights

    recipe, checkpoint, prune = given.recipe, given.source.checkpoint, given.recipe.prune
    chunks, shards = build_gpt(recipe, world.groups, world.device)
    load_weights(checkpoint, shards)
    chunks[0].eval()
    loss = held_out_loss(recipe, world, given.source, chunks, "valid")
    check_sound(loss, checkpoint)
    batches = calibration(recipe, world, given.source, prune.calibration) if prune.calibrates else []
    importance, gone = _importance(given, written.model, world, chunks[0], batches)
    kept = choose(importance, recipe.model, written.model, gone)
    stored = StoredTensors.of_checkpoint(checkpoint)
    own = list(new_names(stored, kept))[world.info.rank :: world.info.world_size]
    changed: dict[str, torch.Tensor] = {}
    if prune.reconstructs:
        from largeformer.compression.pruning.reconstruct import reconstruct
        from largeformer.compression.pruning.structured import staying

        channels = partial(staying, kept, recipe.model)
        changed = reconstruct(chunks[0], shards, batches, world.groups, channels, stored.read, prune.dampening, sources(own, kept))
    del chunks, shards
    begin()
    made = _write_cut(stored, kept, importance, changed, own, given, written)
    table = {**importance.table(), "kept": kept.table(), "removed_in_order": gone}
    world.from_main(lambda: write_atomically(given.folder / "importance.json", (json.dumps(table) + "\n").encode()))
    axes = {axis: {"before": old, "after": new} for axis, (old, new) in narrowed(recipe.model, written.model).items()}
    figures = held_out_figures(loss, _loss_of(made, given, written, world))
    return {"axes": axes, "table": "importance.json", **figures, **world.from_main(lambda: _zeros_left(made))}


def _zeros_left(made: Path) -> dict[str, Any]:
    """What the manifest says of the zeros in a model that was cut from a sparse one. On one process."""
    from largeformer.compression.pruning.sparsity import has_zeros, sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    stored = StoredTensors.of_checkpoint(made)
    return {"sparsity": sparsity_metrics(stored)} if has_zeros(stored) else {}


def _importance(
    given: Input, after: ModelConfig, world: World, chunk: Any, batches: Sequence[Batch]
) -> tuple[Importance, list[int] | None]:
    """What the settings ask for; and the layers that go, where ablation has settled it."""
    from largeformer.compression.pruning import importance
    from largeformer.export.streaming import StoredTensors

    recipe = given.recipe
    if recipe.prune.importance == "weight":
        stored = StoredTensors.of_checkpoint(given.source.checkpoint)
        return world.from_main(lambda: importance.from_weights(stored, recipe.model)), None
    found = importance.from_activations(chunk, batches, world.groups, recipe.model)
    if recipe.prune.importance == "activation":
        return found, None
    rise, gone = importance.by_ablation(chunk, batches, world.groups, recipe.model.num_layers - after.num_layers)
    return replace(found, layers=rise), gone


def _write_cut(
    stored: StoredTensors,
    kept: Kept,
    importance: Importance,
    changed: dict[str, torch.Tensor],
    own: Sequence[str],
    given: Input,
    written: Recipe,
) -> Path:
    """Commit the smaller model as the checkpoint of step 0: each rank its `own` tensors, read and written one at a time."""
    from largeformer.checkpoint.format import Place
    from largeformer.compression.pruning.structured import cut, cut_shape
    from largeformer.training.saving import save_tensors

    before, places = given.recipe.model, []
    for name in own:
        shape, dtype = cut_shape(stored, kept, before, name)
        places.append(Place(name, shape, dtype, (0,) * len(shape), shape))
    read = partial(cut, stored, kept, importance, changed, before)
    return save_tensors(given.folder / "checkpoints", places, read, recipe_yaml(written))


def _loss_of(checkpoint: Path, given: Input, written: Recipe, world: World) -> LossTotal:
    """Of the smaller model: at this layout, or where its shape does not divide by it, whole on every rank."""
    from largeformer.config.checks import recipe_problems

    recipe = written.model_copy(update={"parallel": given.recipe.parallel, "train": given.recipe.train})
    if recipe_problems(recipe):
        recipe = recipe.model_copy(update={"parallel": type(recipe.parallel)()})
        world = world.regroup(recipe)
    return held_out_loss(recipe, world, given.source, load_model(recipe, world, checkpoint), "valid")
