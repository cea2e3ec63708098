"""Train a model from scratch, or go on where an earlier run of the same recipe stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from largeformer.artifact import Artifact, identity_hash
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages import prepare
from largeformer.stages.common import interruptions
from largeformer.stages.common.claim import claim, set_aside
from largeformer.stages.common.damage import check_training
from largeformer.stages.common.feeding import samples_to_train_on
from largeformer.stages.common.interruptions import CutShort
from largeformer.stages.common.prepared_data import another_tokenizer
from largeformer.stages.common.sparse import is_sparse, sparsity_trained
from largeformer.stages.common.training import TrainingJob, train
from largeformer.stages.common.weights import reads_by
from largeformer.stages.common.world import World, check_world, enter_world, reporting

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
        there = world.from_main(lambda: _there(recipe, folder, fresh))
        if recipe.checkpoint.load is not None and (there is None or there.identity != job.identity):
            job = _continued(recipe, world, job, Path(recipe.checkpoint.load))
        world.from_main(lambda: claim(folder, recipe, STAGE, fresh))
        artifact = world.from_main(lambda: Artifact.read(folder))
        if artifact is None:
            artifact = train(recipe, world, job, ended)
        if artifact is None:
            report("requeue")
    return artifact


def _there(recipe: Recipe, folder: Path, fresh: bool) -> Artifact | None:
    """What has finished in `folder`. Raises BadInputError where it went on from what stood at `checkpoint.load` before another took its
    place; with `fresh` the folder is set aside instead. On rank 0 only."""
    there = Artifact.read(folder)
    now = _made_by(Path(recipe.checkpoint.load)) if there is not None and recipe.checkpoint.load is not None else None
    if there is None or now is None or there.parents.get(now.kind, now.identity) == now.identity:
        return there
    if not fresh:
        raise BadInputError(
            f"{folder} went on from another {now.kind} ({there.parents[now.kind]}) than stands in {now.path} now ({now.identity}): choose "
            "another run.output_dir, or pass --fresh to set the old folder aside"
        )
    set_aside(folder)
    return None


def _made_by(load: Path) -> Artifact | None:
    """The finished stage whose checkpoint `load` names; None where nobody can tell, or it is gone: what has finished needs it no more."""
    from largeformer.checkpoint.verify import find

    try:
        return Artifact.read(find(load, False).checkpoint.parent.parent)
    except BadInputError:
        return None


def _continued(recipe: Recipe, world: World, job: TrainingJob, source: Path) -> TrainingJob:
    """The job as it goes on from `source`; zeros of a pruned model stay. Collective. Raises BadInputError where there is no checkpoint, one
    that reads by another tokenizer, or nothing left to train."""
    from largeformer.checkpoint.commit import committed
    from largeformer.checkpoint.verify import find
    from largeformer.data.ramp import BatchSizes
    from largeformer.training.checkpointing import read_state
    from largeformer.training.masks import hold_zeros

    begun = world.from_main(lambda: bool(committed(job.folder / "checkpoints")))  # then its weights are not read again
    found = find(source, recipe.checkpoint.verify == "sha256" and not begun)
    job, start = replace(job, continues=found), found.checkpoint
    state, made_by = world.from_main(lambda: (read_state(start), Artifact.read(start.parent.parent)))
    if made_by is not None:
        job = replace(job, parents={made_by.kind: made_by})
    told = state["extra"].get("text") or world.from_main(lambda: reads_by(start))
    if other := another_tokenizer(told, job.prepared):
        raise BadInputError(f"checkpoint.load {start} reads by {other}: prepare the text with the model's own (tokenizer.model)")
    step = state["progress"]["step"]
    if not begun and step >= recipe.train.train_iters:
        raise BadInputError(
            f"checkpoint.load {start} is of step {step}, and train.train_iters is {recipe.train.train_iters}, which counts from 0: set it "
            "to more"
        )
    read, batches = state["progress"]["samples"], BatchSizes(recipe.train)
    needed = batches.samples_after(recipe.train.train_iters) - batches.samples_after(step)
    if not begun and read + needed > samples_to_train_on(recipe):
        raise BadInputError(
            f"checkpoint.load {start} has read {read:,} samples, more than {step} steps of this recipe's batches: set "
            "train.global_batch_size to its own"
        )
    if not world.from_main(lambda: is_sparse(start)):
        return job
    return replace(
        job,
        alter=lambda chunks, shards: hold_zeros(start, shards),
        measure=lambda training: sparsity_trained(world, start, job.folder),
    )
