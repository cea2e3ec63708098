"""`quantize`: a model's linear layers made ready to be integers, in `<output_dir>/quantize/`.

    checkpoints/            the weights, still floats: smoothed, on GPTQ's grid, or trained with rounding
    quantization.json       what becomes of them, and quantization.safetensors: the scales; `export` writes the integers by them
    layers.json             how far off each linear layer's output is, and which are kept
    manifest.json           last of all: the model beside what it was, on held-out text

Calibration runs without pipeline stages, whose ranks read other text instead; only quantization-aware training uses the recipe's layout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact, identity_hash, library_versions, write_atomically
from largeformer.config.chain import StageEntry, at_stage, entry_named
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.common import interruptions, prepared_data
from largeformer.stages.common.calibrating import check_calibration
from largeformer.stages.common.feeding import check_text
from largeformer.stages.common.held_out import check_held_out
from largeformer.stages.common.inputs import Input, finished, input_of, record, take
from largeformer.stages.common.interruptions import CutShort
from largeformer.stages.common.teaching import Tutor
from largeformer.stages.common.training import LIBRARIES, TrainingJob, train
from largeformer.stages.common.weights import Source, inference_layout, load_model
from largeformer.stages.common.world import World, check_world, enter_world, reporting
from largeformer.training.signals import StopSignals

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.models.shards import Shard
    from largeformer.stages.quantize_scales import Made

STAGE = "quantize"
LAYERS = "layers.json"
_SHOWN = 8


def run(
    recipe: Recipe,
    source: Path | None = None,
    *,
    fresh: bool = False,
    entry: StageEntry | None = None,
    cut_short: CutShort | None = None,
) -> Artifact | None:
    """Quantize the checkpoint at `source` (default: of the stage before this one in the recipe's own run). Returns the artifact; with
    method qat None where `exit_iteration` came before the end. Raises BadInputError, StageFailed, or StopRequested for a signal."""
    entry = entry or entry_named(recipe, STAGE)
    staged = at_stage(recipe, entry)
    if staged.quantize.trains:
        return _run_training(recipe, staged, source, fresh, entry, cut_short)
    flat = inference_layout(recipe, discover(os.environ).world_size)
    with reporting(recipe, entry.name), StopSignals.current().at_once(), enter_world(flat, training=False) as world:
        given = input_of(recipe, entry, source)
        done, complete = _look(given, world, fresh)
        if complete:
            return done
        made = _finish(given, world, _unfinished(given), None)
        if world.info.is_main:
            record(given, made)
        return made


def _run_training(
    recipe: Recipe, staged: Recipe, source: Path | None, fresh: bool, entry: StageEntry, cut_short: CutShort | None
) -> Artifact | None:
    """Train with rounding at the recipe's layout; smooth and calibrate before, and measure afterwards, at an inference layout."""
    check_world(staged)
    ended = (cut_short or interruptions.cut_short(recipe)).get(entry.name)
    with reporting(recipe, entry.name) as report, enter_world(staged) as world:
        given = input_of(recipe, entry, source)
        artifact, complete = _look(given, world, fresh)
        if complete:
            return artifact
        if artifact is None:
            check_text(given.recipe, world, given.source.prepared)
            artifact = _train(given, world, ended)
        if artifact is None:
            report("requeue")
            return None
        return _finish(given, world, artifact, replace(given.source, checkpoint=_newest(given)))


def _look(given: Input, world: World, fresh: bool) -> tuple[Artifact | None, bool]:
    """The artifact that is there, and whether it is complete, or only its training. Raises BadInputError for what cannot be. Collective."""
    from largeformer.stages.quantize_checks import check

    def look() -> tuple[Artifact | None, bool]:
        check(given.recipe)
        done = finished(given, given.origin(), fresh=fresh)
        # Where a training has ended the manifest is there before the figures are.
        if done is not None and "scheme" in done.metrics and _is_described(given):
            return done, True
        flat = _flat(given, world).recipe
        check_calibration(flat, given.source, flat.quantize.calibration, flat.layout(world.info.world_size).data)
        check_held_out(flat, given.source.prepared, "test")
        return done, False

    return world.from_main(look)


def _is_described(given: Input) -> bool:
    """Whether the scales of the finished stage are there as they were written; what training had left is found again without it."""
    from largeformer.compression.quantization.description import read_description

    try:
        return read_description(_newest(given)) is not None
    except BadInputError as damage:
        print(f"{damage}: the scales are found anew", flush=True)
        return False


def _train(given: Input, world: World, cut_short: str | None) -> Artifact | None:
    from largeformer.compression.quantization.fake_quantization import train_rounded
    from largeformer.models.dropout import without_dropout
    from largeformer.stages.quantize_scales import kept_layers, scheme_of, start_of_training
    from largeformer.training.gradual import hold_growing

    flat = _flat(given, world)
    begin = partial(world.from_main, lambda: take(given, given.origin()))
    start = start_of_training(flat, world.regroup(flat.recipe), recipe_yaml(given.recipe), begin)
    world = world.regroup(given.recipe)
    lesson = given.recipe.quantize.distill
    tutor = Tutor(load_model(given.recipe, world, given.source.checkpoint), lesson, world) if lesson is not None else None

    def alter(chunks: Sequence[GPT], shards: Sequence[Shard]) -> None:
        train_rounded(chunks, shards, world.groups, scheme_of(given.recipe.quantize), start.input_scales, kept_layers(given.recipe))
        hold_growing(shards, given.recipe.model)  # which here does not grow: pruned weights stay 0
        if tutor is not None:
            without_dropout(chunks)  # beside its own floats a model needs nothing against overfitting, and noise leads away from them
            tutor.follow(chunks)

    parents = {name: parent for name, parent in given.parents.items() if parent is not given.source.prepared}
    identity = identity_hash(given.origin())
    job = TrainingJob(STAGE, given.folder, identity, given.source.prepared, parents, start=start.checkpoint, alter=alter)
    if tutor is not None:
        job = replace(job, accompany=tutor.accompany)
    return train(given.recipe, world, job, cut_short)


def _flat(given: Input, world: World) -> Input:
    return replace(given, recipe=inference_layout(given.recipe, world.info.world_size))


def _newest(given: Input) -> Path:
    from largeformer.checkpoint.commit import newest

    checkpoint = newest(given.folder / "checkpoints")
    assert checkpoint is not None, "training has ended with one"
    return checkpoint


def _unfinished(given: Input) -> Artifact:
    origin = given.origin()
    reads_by, versions = prepared_data.tokenizer_of(given.source.prepared), library_versions((*LIBRARIES, "compressed-tensors"))
    return Artifact(STAGE, given.folder, identity_hash(origin), origin["parents"], reads_by, versions)


def _finish(given: Input, world: World, artifact: Artifact, trained: Source | None) -> Artifact:
    """Find the scales, measure the model beside what the stage was given, and write everything. Collective."""
    from largeformer.stages.quantize_scales import SMOOTHED, quantize

    flat = _flat(given, world)
    made = quantize(flat, world.regroup(flat.recipe), trained, recipe_yaml(given.recipe))
    artifact = replace(artifact, metrics={**artifact.metrics, **made.metrics})

    def write() -> None:
        write_atomically(given.folder / LAYERS, (json.dumps(made.table, indent=2) + "\n").encode())
        made.description.write(given.folder)
        shutil.rmtree(given.folder / SMOOTHED, ignore_errors=True)
        artifact.write()
        _print(made)

    world.from_main(write)
    return artifact


def _print(made: Made) -> None:
    """The layers that are furthest off, those that stay floats, and what came of it."""
    worst = sorted((row for row in made.table.items() if not row[1]["kept"]), key=lambda row: -row[1]["relative_error"])
    width = max((len(name) for name, _ in worst), default=0)
    print(f"{'the linear layers furthest off':{width + 4}}  error   SQNR")
    for name, row in worst[:_SHOWN]:
        stays = "  stays float" if row["float"] else ""
        print(f"    {name:{width}}  {row['relative_error']:6.2%}  {row['sqnr_db']:4.1f} dB{stays}")
    metrics = made.metrics
    if made.description.ignore:
        print(f"{len(made.description.ignore)} of {len(made.table)} stay floats: {', '.join(made.description.ignore)}")
    print(
        f"{metrics['scheme']} by {metrics['method']}: perplexity {metrics['perplexity_before']:.4f} -> {metrics['perplexity']:.4f} "
        f"({metrics['perplexity_increase']:+.2%}), {metrics['bits_per_byte']:.4f} bits/byte, KL {metrics['kl']:.2e}, "
        f"same likeliest token {metrics['top1_agreement']:.2%} (test split, {metrics['tokens']:,} tokens)",
        flush=True,
    )
