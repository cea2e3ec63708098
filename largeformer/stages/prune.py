"""`prune`: channels, heads, layers or single weights out of a trained model.

RUN/prune/checkpoints/   the smaller model, or one of the same shape with zeros
RUN/prune/importance.json or zeros.json: what each layer's parts were worth, and which stay; or each weight's zeros
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact, identity_hash, library_versions, write_atomically
from largeformer.config.chain import StageEntry, at_stage, entry_named
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.common import interruptions, prepared_data
from largeformer.stages.common.feeding import check_text
from largeformer.stages.common.held_out import check_sound, held_out_figures, held_out_loss
from largeformer.stages.common.inputs import Input, finished, input_of, record, take
from largeformer.stages.common.interruptions import CutShort
from largeformer.stages.common.training import Accompanied, TrainingJob, train
from largeformer.stages.common.weights import inference_layout, load_model
from largeformer.stages.common.world import World, check_world, enter_world, reporting
from largeformer.stages.prune_smaller import smaller
from largeformer.training.signals import StopSignals

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.models.shards import Shard
    from largeformer.training.engine import Engine
    from largeformer.training.gradual import Masked
    from largeformer.training.trainer import BatchSource, Training

STAGE = "prune"
_LIBRARIES = ("largeformer", "torch", "megatron-core")


def run(
    recipe: Recipe,
    source: Path | None = None,
    *,
    fresh: bool = False,
    entry: StageEntry | None = None,
    cut_short: CutShort | None = None,
) -> Artifact | None:
    """Prune the checkpoint at `source` (default: of the stage before this one in the recipe's own run), as `prune` says. Returns the
    artifact; one that is there for this checkpoint and these settings is returned as it is. None where `exit_iteration` ended a gradual
    schedule before its end. Raises StopRequested where a signal or the clock did."""
    entry = entry or entry_named(recipe, STAGE)
    staged = at_stage(recipe, entry)
    if staged.prune.trains:
        return _gradually(recipe, staged, source, fresh, entry, cut_short)
    whole = inference_layout(recipe, discover(os.environ).world_size)
    with reporting(recipe, entry.name), StopSignals.current().at_once(), enter_world(whole, training=False) as world:
        given = input_of(whole, entry, source)
        work = smaller if given.recipe.prune.structured else _sparser
        return _once(recipe, given, world, fresh, work)


def _gradually(
    recipe: Recipe, staged: Recipe, source: Path | None, fresh: bool, entry: StageEntry, cut_short: CutShort | None
) -> Artifact | None:
    """In a training at the recipe's layout; measured before and after at an inference layout."""
    check_world(staged)
    ended = (cut_short or interruptions.cut_short(recipe)).get(entry.name)
    with reporting(recipe, entry.name) as report, enter_world(staged) as world:
        given = input_of(recipe, entry, source)
        if given.source.prepared.kind != prepared_data.KIND:
            raise BadInputError(f"{given.source.checkpoint} has no prepared text to train on: prune at once, without prune.schedule")
        artifact = world.from_main(lambda: finished(given, given.origin(), fresh=fresh))
        if artifact is not None and "perplexity" in artifact.metrics:
            return artifact
        if artifact is None:
            check_text(given.recipe, world, given.source.prepared)
            world.from_main(lambda: take(given, given.origin()))
            artifact = _train(given, world, ended)
        if artifact is None:
            report("requeue")
            return None
        return _measured(given, world, artifact)


def _train(given: Input, world: World, cut_short: str | None) -> Artifact | None:
    from largeformer.training.gradual import GradualPruning, hold_growing

    recipe = given.recipe
    masked: list[Masked] = []

    def alter(chunks: Sequence[GPT], shards: Sequence[Shard]) -> None:
        masked[:] = hold_growing(shards, recipe.model)

    def accompany(engine: Engine, data: BatchSource) -> Accompanied:
        pruning = GradualPruning(engine, data, masked, recipe.prune)
        return Accompanied(pruning, {"prune": pruning})

    prepared = given.source.prepared
    parents = {name: parent for name, parent in given.parents.items() if parent is not prepared}
    identity, start = identity_hash(given.origin()), given.source.checkpoint
    measure = partial(_sparsity_of, given, world, masked)
    job = TrainingJob(STAGE, given.folder, identity, prepared, parents, start, alter, accompany, measure)
    return train(recipe, world, job, cut_short)


def _sparsity_of(given: Input, world: World, masked: Sequence[Masked], training: Training) -> dict[str, Any]:
    """Of the model that came out; before the manifest is written, so that a stage that has lost a zero, of its start or of those that
    grew, or has not reached its share, has not finished. Collective."""
    from largeformer.compression.pruning.sparsity import assert_share
    from largeformer.export.streaming import StoredTensors
    from largeformer.training.gradual import assert_masks_kept

    made, prune = world.from_main(lambda: _made(given)), given.recipe.prune
    assert_masks_kept(made, masked)

    def reached() -> dict[str, Any]:
        assert_share(StoredTensors.of_checkpoint(made), prune.share, together=prune.scope == "global")
        return _zeros(given, made)

    return world.from_main(reached)


def _made(given: Input) -> Path:
    from largeformer.checkpoint.commit import newest

    made = newest(given.folder / "checkpoints")
    assert made is not None, "training has ended with one"
    return made


def _measured(given: Input, world: World, artifact: Artifact) -> Artifact:
    """The manifest with what the model that came out has lost. Collective."""
    from largeformer.models.flops import parameter_count

    made = _made(given)
    flat = inference_layout(given.recipe, world.info.world_size)
    world = world.regroup(flat)
    before, after = (
        held_out_loss(flat, world, given.source, load_model(flat, world, checkpoint), "valid")
        for checkpoint in (given.source.checkpoint, made)
    )
    parameters = parameter_count(flat.model, flat.tokenizer.vocab_size)
    metrics = {
        **artifact.metrics,
        "method": flat.prune.method,
        "checkpoint": given.source.checkpoint.name,
        "parameters_before": parameters,
        "parameters": parameters,
        "parameters_kept": 1.0,
        **held_out_figures(before, after),
    }
    artifact = replace(artifact, metrics=metrics)
    world.from_main(artifact.write)
    if world.info.is_main:
        _print(metrics)
    return artifact


Work = Callable[[Input, Recipe, World, Callable[[], None]], dict[str, Any]]


def _once(recipe: Recipe, given: Input, world: World, fresh: bool, work: Work) -> Artifact:
    """What `work` gives as metrics, as an artifact; or the one that is there. The folder is taken by `work`, right before it writes."""
    from largeformer.models.flops import parameter_count

    written = _as_written(recipe, given)
    origin, own = given.origin(), replace(given, recipe=written)
    there = world.from_main(lambda: finished(own, origin, fresh=fresh))
    if there is not None:
        return there
    vocab = given.recipe.tokenizer.vocab_size
    parameters, before = parameter_count(written.model, vocab), parameter_count(given.recipe.model, vocab)
    metrics = {
        "method": given.recipe.prune.method,
        "checkpoint": given.source.checkpoint.name,
        "parameters_before": before,
        "parameters": parameters,
        "parameters_kept": parameters / before,
        **prepared_data.tokenizer_of(given.source.prepared),
        **work(given, written, world, lambda: world.from_main(lambda: take(own, origin))),
    }
    artifact = Artifact(STAGE, given.folder, identity_hash(origin), origin["parents"], metrics, library_versions(_LIBRARIES))
    world.from_main(artifact.write)
    if world.info.is_main:
        _print(metrics)
        record(given, artifact)
    return artifact


def _as_written(recipe: Recipe, given: Input) -> Recipe:
    """The recipe that the result says it was made with: the layout that was asked for, and the shape that it has."""
    from largeformer.compression.pruning.shape import pruned_shape
    from largeformer.compression.pruning.unstructured import pattern_problems

    read = given.recipe
    if problems := pattern_problems(read.model, read.prune):
        raise BadInputError(problems)
    model = pruned_shape(read.model, read.tokenizer.vocab_size, read.prune) if read.prune.structured else read.model
    return read.model_copy(update={"model": model, "parallel": recipe.parallel, "train": at_stage(recipe, given.entry).train})


def _sparser(given: Input, written: Recipe, world: World, begin: Callable[[], None]) -> dict[str, Any]:
    """Zeros, at once."""
    from largeformer.compression.pruning.unstructured import sparsify
    from largeformer.models.gpt import build_gpt
    from largeformer.stages.common.calibrating import calibration
    from largeformer.training.checkpointing import load_weights
    from largeformer.training.saving import save_weights

    recipe, prune = given.recipe, given.recipe.prune
    chunks, shards = build_gpt(recipe, world.groups, world.device)
    load_weights(given.source.checkpoint, shards)
    chunks[0].eval()
    loss = held_out_loss(recipe, world, given.source, chunks, "valid")
    check_sound(loss, given.source.checkpoint)
    batches = calibration(recipe, world, given.source, prune.calibration) if prune.calibrates else []
    sparsify(chunks[0], shards, world.groups, recipe.model, prune, batches)
    after = held_out_loss(recipe, world, given.source, chunks, "valid")
    begin()
    made = save_weights(given.folder / "checkpoints", shards, recipe_yaml(written))
    return {**held_out_figures(loss, after), **world.from_main(lambda: _zeros(given, made))}


def _zeros(given: Input, made: Path) -> dict[str, Any]:
    """What the manifest says of the zeros, and a table of them by weight. On one process."""
    from largeformer.compression.pruning.sparsity import assert_zeros_kept, count_zeros, sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    parent, child = (StoredTensors.of_checkpoint(checkpoint) for checkpoint in (given.source.checkpoint, made))
    assert_zeros_kept(parent, child)
    table = {name: {**asdict(count), "share": count.share} for name, count in count_zeros(child).items()}
    write_atomically(given.folder / "zeros.json", (json.dumps(table) + "\n").encode())
    return {"sparsity": sparsity_metrics(child, given.recipe.prune.kept_of), "table": "zeros.json"}


def _print(metrics: dict[str, Any]) -> None:
    sizes = ", ".join(f"{axis} {size['before']} -> {size['after']}" for axis, size in metrics.get("axes", {}).items())
    if "sparsity" in metrics:
        print(f"{metrics['sparsity']['overall']:.2%} of {metrics['sparsity']['weights']:,} weights in linear layers are 0")
    print(
        f"{metrics['parameters_before']:,} -> {metrics['parameters']:,} parameters ({metrics['parameters_kept']:.1%})"
        + (f": {sizes}" if sizes else "")
    )
    print(
        f"perplexity on the valid split {metrics['perplexity_before']:.2f} -> {metrics['perplexity']:.2f} "
        f"({metrics['perplexity_increase']:+.1%})",
        flush=True,
    )
