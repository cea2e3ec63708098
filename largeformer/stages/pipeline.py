"""`run`: the recipe's stages in turn. A stage whose artifact is there and belongs to the recipe is not run again.

A setting that has changed re-runs the stages that depend on it. What cost a training from scratch is only set aside with `fresh`; what was
made from a trained model is set aside without being asked, and made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from largeformer.artifact import Artifact
from largeformer.config.chain import StageEntry, at_stage
from largeformer.config.checks import calibration_problems
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages import distill, evaluate, export, prepare, pretrain, prune, quality, quantize
from largeformer.stages.common.held_out import check_held_out
from largeformer.stages.common.interruptions import CutShort, cut_short
from largeformer.stages.common.libraries import check_libraries
from largeformer.stages.common.weights import find_source, shaped_like
from largeformer.stages.common.world import check_world, reporting
from largeformer.stages.pipeline_shapes import check_shapes
from largeformer.stages.quality_report import write_report

STAGES: dict[str, Callable[[Recipe, StageEntry, bool, CutShort], Artifact | None]] = {
    "prepare": lambda recipe, entry, fresh, ended: prepare.run_or_wait(recipe, fresh=fresh),
    "pretrain": lambda recipe, entry, fresh, ended: pretrain.run(recipe, fresh=fresh, cut_short=ended),
    "prune": lambda recipe, entry, fresh, ended: prune.run(recipe, fresh=True, entry=entry, cut_short=ended),
    "distill": lambda recipe, entry, fresh, ended: distill.run(recipe, fresh=True, entry=entry, cut_short=ended),
    "quantize": lambda recipe, entry, fresh, ended: quantize.run(recipe, fresh=True, entry=entry, cut_short=ended),
    "evaluate": lambda recipe, entry, fresh, ended: evaluate.run(recipe, again=False, entry=entry),
    "export": lambda recipe, entry, fresh, ended: export.run(recipe, fresh=fresh or _is_ours(recipe, entry), entry=entry),
}


def _is_ours(recipe: Recipe, entry: StageEntry) -> bool:
    """Whether the stage's folder is an earlier result, which may be set aside, and not something else that lies in the way."""
    return Artifact.read(Path(recipe.run.output_dir) / entry.name) is not None


def _reads_test_split(recipe: Recipe) -> bool:
    return quality.is_judged(recipe) or any(entry.stage in ("evaluate", "export") for entry in recipe.run.stages)


def _check_given_model(recipe: Recipe) -> None:
    """Raise BadInputError, before the first stage, where the text of a model that the chain was given has no test split to judge on."""
    first = quality.first_model(recipe)
    is_given = all(entry.stage not in ("prepare", *quality.TRAINED) for entry in recipe.run.stages)
    if is_given and first is not None and quality.is_judged(recipe):
        # By sizes alone: no world is there yet, and every rank would hash all the weights. The stage that reads them does.
        by_size = recipe.checkpoint.model_copy(update={"verify": "size"})
        source = find_source(recipe.model_copy(update={"checkpoint": by_size}), first)
        check_held_out(shaped_like(recipe, source), source.prepared, "test")


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact | None:
    """Run the stages that `run.stages` names. Returns the last one's artifact, or None where one was asked to stop before its end. Raises
    BadInputError, before the first, where one of them does not fit this world or this machine."""
    world = discover(os.environ)
    for entry in recipe.run.stages:
        if entry.stage in (*quality.TRAINED, *quality.DERIVED):
            there = at_stage(recipe, entry)
            check_world(there)
            if problems := calibration_problems(there, entry.stage, world.world_size):
                raise BadInputError([f"in {entry.name}: {problem}" for problem in problems])
    check_libraries(recipe, fresh=fresh)
    check_shapes(recipe)
    _check_given_model(recipe)
    is_main, ended = world.is_main, cut_short(recipe)
    artifact: Artifact | None = None
    for number, entry in enumerate(recipe.run.stages, start=1):
        if is_main:
            print(f"[{number}/{len(recipe.run.stages)}] {entry.name} -> {Path(recipe.run.output_dir) / entry.name}", flush=True)
        artifact = STAGES[entry.stage](recipe, entry, fresh, ended)
        if artifact is None:
            return None
        if entry.stage == "prepare" and _reads_test_split(recipe):  # told now, not after the training
            with reporting(recipe, entry.stage):
                check_held_out(recipe, artifact, "test")
        if quality.is_judged(recipe) and entry.stage in (*quality.TRAINED, *quality.DERIVED):
            quality.assess(recipe, entry)
    if is_main and quality.is_judged(recipe):
        write_report(recipe)
    return artifact
