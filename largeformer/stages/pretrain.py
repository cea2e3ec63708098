"""Train a model from scratch, or go on where an earlier run of the same recipe stopped."""

from __future__ import annotations

from pathlib import Path

from largeformer.artifact import Artifact, identity_hash
from largeformer.config.schema import Recipe
from largeformer.stages import prepare
from largeformer.stages.common import interruptions
from largeformer.stages.common.claim import claim
from largeformer.stages.common.damage import check_training
from largeformer.stages.common.training import TrainingJob, train
from largeformer.stages.common.world import check_world, enter_world, reporting

STAGE = "pretrain"


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact | None:
    """Train under `<output_dir>/pretrain`. Returns the artifact, or None where `exit_iteration` came before the end. Raises StopRequested
    where a signal or the clock did."""
    folder = Path(recipe.run.output_dir) / STAGE
    check_world(recipe)
    cut_short = interruptions.cut_short(recipe)
    prepared = prepare.run_or_wait(recipe, fresh=fresh)
    with reporting(recipe, STAGE) as report, enter_world(recipe) as world:
        world.from_main(lambda: check_training(folder, identity_hash(recipe.identity(STAGE)), fresh))
        world.from_main(lambda: claim(folder, recipe, STAGE, fresh))
        artifact = world.from_main(lambda: Artifact.read(folder))
        if artifact is None:
            job = TrainingJob(STAGE, folder, identity_hash(recipe.identity(STAGE)), prepared)
            artifact = train(recipe, world, job, cut_short)
        if artifact is None:
            report("requeue")
    return artifact
