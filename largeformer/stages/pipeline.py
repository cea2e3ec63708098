"""`run`: the recipe's stages in turn. A stage whose artifact is there and belongs to the recipe is not run again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from largeformer.artifact import Artifact
from largeformer.config.schema import Recipe
from largeformer.parallel.environment import discover
from largeformer.stages import evaluate, export, prepare, pretrain

STAGES: dict[str, Callable[[Recipe, bool], Artifact | None]] = {
    "prepare": lambda recipe, fresh: prepare.run_or_wait(recipe, fresh=fresh),
    "pretrain": lambda recipe, fresh: pretrain.run(recipe, fresh=fresh),
    "evaluate": lambda recipe, fresh: evaluate.run(recipe, again=fresh),
    "export": lambda recipe, fresh: export.run(recipe, fresh=fresh),
}


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact | None:
    """Run the stages that `run.stages` names. Returns the last one's artifact, or None where one was asked to stop before its end."""
    is_main = discover(os.environ).is_main
    artifact: Artifact | None = None
    for number, stage in enumerate(recipe.run.stages, start=1):
        if is_main:
            print(f"[{number}/{len(recipe.run.stages)}] {stage} -> {Path(recipe.run.output_dir) / stage}", flush=True)
        artifact = STAGES[stage](recipe, fresh)
        if artifact is None:
            return None
    return artifact
