"""Train a model from scratch, or go on where an earlier run of the same recipe stopped."""

from __future__ import annotations

from pathlib import Path

from largeformer.artifact import Artifact, identity_hash
from largeformer.config.schema import Recipe
from largeformer.stages import prepare
from largeformer.stages.common import interruptions
from largeformer.stages.common.claim import claim
from largeformer.stages.common.damage import check_training
from largeformer.stages.common.interruptions import CutShort
from largeformer.stages.common.training import TrainingJob, train
from largeformer.stages.common.world import check_world, enter_world, reporting
from largeformer.stages.pretrain_source import check_source, continued, note

STAGE = "pretrain"


def run(recipe: Recipe, *, fresh: bool = False, cut_short: CutShort | None = None) -> Artifact | None:
    """Train under `<output_dir>/pretrain`. Returns the artifact, or None where `exit_iteration` came before the end. Raises StopRequested
    where a signal or the clock did."""
    folder = Path(recipe.run.output_dir) / STAGE
    check_world(recipe)
    ended = (cut_short or interruptions.cut_short(recipe)).get(STAGE)
    prepared = prepare.run_or_wait(recipe, fresh=fresh)
    with reporting(recipe, STAGE) as report, enter_world(recipe) as world:
        job = TrainingJob(STAGE, folder, identity_hash(recipe.identity(STAGE)), prepared)
        world.from_main(lambda: check_training(folder, job.identity, fresh))
        world.from_main(lambda: check_source(recipe, folder, fresh))
        there, origin = world.from_main(lambda: Artifact.read(folder)), None
        if recipe.checkpoint.load is not None and (there is None or there.identity != job.identity):
            job, origin = continued(recipe, world, job)
        world.from_main(lambda: claim(folder, recipe, STAGE, fresh))
        if origin is not None:
            world.from_main(lambda: note(folder, origin))
        artifact = world.from_main(lambda: Artifact.read(folder))
        if artifact is None:
            artifact = train(recipe, world, job, ended)
        if artifact is None:
            report("requeue")
    return artifact
