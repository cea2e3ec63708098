"""Train a model from scratch, or go on where an earlier run of the same recipe stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact, identity_hash, library_versions
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.stages import prepare
from largeformer.stages.claim import claim
from largeformer.stages.world import World, check_world, enter_world, reporting

if TYPE_CHECKING:
    from largeformer.data.loader import Batches
    from largeformer.evaluation.perplexity import LossTotal
    from largeformer.models.gpt import GPT
    from largeformer.tracking.tracker import FanOut
    from largeformer.training.checkpointing import TrainingState
    from largeformer.training.metrics import Machine
    from largeformer.training.trainer import Outcome, Training

STAGE = "pretrain"
LIBRARIES = ("largeformer", "torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact | None:
    """Train under `<output_dir>/pretrain`. Returns the artifact, or None where the run was asked to stop before its end."""
    folder = Path(recipe.run.output_dir) / STAGE
    check_world(recipe)
    prepared = prepare.run_or_wait(recipe, fresh=fresh)
    with reporting(recipe, STAGE) as report, enter_world(recipe) as world:
        world.from_main(lambda: claim(folder, recipe, STAGE, fresh))
        artifact = world.from_main(lambda: Artifact.read(folder)) or _train(recipe, world, prepared, folder)
        if artifact is None:
            report("requeue")
    return artifact


def _train(recipe: Recipe, world: World, prepared: Artifact, folder: Path) -> Artifact | None:
    from largeformer.training.trainer import fit

    training, tracker = assemble(recipe, world, prepared, folder)
    with ExitStack() as closing:
        closing.callback(lambda: tracker.close("failed"))
        outcome = fit(training)
        artifact = None if outcome == "exit requested" else _finish(recipe, world, prepared, folder, training, outcome)
        closing.pop_all()
    if artifact is not None:
        tracker.artifact(artifact, [prepared])
    tracker.close("requeue" if artifact is None else "finished")
    return artifact


def assemble(recipe: Recipe, world: World, prepared: Artifact, folder: Path) -> tuple[Training, FanOut]:
    """Everything that `fit` works with, in the order in which one part needs another. Resumes where there is a checkpoint."""
    from largeformer.checkpoint.commit import locate, newest
    from largeformer.models.gpt import build_gpt
    from largeformer.training.checkpointing import Progress, TrainingState, load_training_state, load_weights
    from largeformer.training.early_stopping import EarlyStopping
    from largeformer.training.engine import build_engine
    from largeformer.training.saving import Checkpoints
    from largeformer.training.schedule import LearningRateSchedule
    from largeformer.training.trainer import Training

    checkpoints = folder / "checkpoints"
    # Rank 0 looks, for all: another rank's view of a shared file system may be older.
    given = recipe.checkpoint.load
    checkpoint = world.from_main(lambda: newest(checkpoints) or (locate(Path(given)) if given else None))
    chunks, shards = build_gpt(recipe, world.groups, world.device)
    if checkpoint is not None:
        load_weights(checkpoint, shards)
    engine = build_engine(recipe, chunks, shards, world.groups, world.deepspeed)
    state = load_training_state(checkpoint, engine) if checkpoint is not None else TrainingState(Progress())
    data, validate = _data(recipe, world, prepared, chunks, state.progress.samples)
    tracker = _tracker(recipe, world, folder, state, checkpoint)
    training = Training(
        train=recipe.train,
        engine=engine,
        data=data,
        schedule=LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters),
        early_stopping=EarlyStopping.restored(recipe.train.early_stopping, state.early_stopping),
        tracker=tracker,
        machine=_machine(recipe, world),
        device=world.device,
        validate=validate,
        checkpoints=Checkpoints(checkpoints, engine, tracker, recipe_yaml(recipe), recipe.checkpoint),
        save_interval=recipe.checkpoint.save_interval,
        wandb_run_id=tracker.wandb_run_id,
        progress=state.progress,
        validation=state.validation,
    )
    state.restore(training.parts)
    return training, tracker


def _data(
    recipe: Recipe, world: World, prepared: Artifact, chunks: Sequence[GPT], consumed_samples: int
) -> tuple[Batches, Callable[[], LossTotal]]:
    """This data rank's batches from `consumed_samples` on, and the validation that runs between them."""
    from largeformer.data.loader import Batches, fixed_batches
    from largeformer.data.ramp import BatchSizes
    from largeformer.data.splits import build_splits
    from largeformer.evaluation.perplexity import evaluate

    train, place = recipe.train, (world.groups.coordinates.data, world.groups.layout.data)
    tokenizer = prepare.open_tokenizer(recipe, prepared.path)
    sizes = BatchSizes(train)
    splits = build_splits(
        recipe.data,
        recipe.model.seq_length,
        tokenizer,
        prepare.prefixes(recipe, prepared.path),
        (sizes.samples_after(train.train_iters), train.eval_iters * train.global_batch_size, 0),
        recipe.run.seed,
        prepared.path / "cache",
    )
    training, validation = splits.train, splits.valid
    assert training is not None and validation is not None, "samples of both were asked for"
    batches = Batches(
        training,
        train.micro_batch_size,
        *place,
        batch_sizes=sizes.at,
        consumed_samples=consumed_samples,
        num_workers=recipe.data.num_workers,
    )

    def validate() -> LossTotal:
        held_out = fixed_batches(validation, train.eval_iters, train.global_batch_size, train.micro_batch_size, *place)
        return evaluate(chunks, held_out, world.groups, tokenizer.piece_bytes)

    return batches, validate


def _tracker(recipe: Recipe, world: World, folder: Path, state: TrainingState, checkpoint: Path | None) -> FanOut:
    from largeformer.tracking.build import build_trackers
    from largeformer.tracking.provenance import git_state

    tracker = build_trackers(
        recipe.tracking,
        folder,
        recipe.run.name,
        {
            "recipe": recipe.model_dump(mode="json"),
            "layout": asdict(world.groups.layout),
            "deepspeed": world.deepspeed,
            "git": git_state(Path.cwd()),
            "versions": library_versions(LIBRARIES),
        },
        resume_step=state.progress.step,
        total_steps=recipe.train.train_iters,
        wandb_run_id=state.wandb_run_id,
        enabled=world.info.is_main,
    )
    if checkpoint is not None:
        tracker.event("resumed", state.progress.step, checkpoint=checkpoint.name)
    return tracker


def _machine(recipe: Recipe, world: World) -> Machine:
    """What MFU is measured against. Rank 0 measures a CPU, with its share of the cores: ranks would disturb each other."""
    from largeformer.models.flops import flops_per_token, peak_flops
    from largeformer.training.metrics import Machine

    per_token = flops_per_token(recipe.model, recipe.tokenizer.vocab_size)
    peak = world.from_main(lambda: peak_flops(recipe.train.precision, world.device))
    return Machine(per_token, world.info.world_size, peak)


def _finish(recipe: Recipe, world: World, prepared: Artifact, folder: Path, training: Training, outcome: Outcome) -> Artifact:
    total = training.validate()
    artifact = Artifact(
        kind=STAGE,
        path=folder,
        identity=identity_hash(recipe.identity(STAGE)),
        parents={prepared.kind: prepared.identity},
        metrics={
            "outcome": outcome,
            "steps": training.progress.step,
            "tokens": training.progress.tokens,
            "val_loss": total.loss,
            "val_bits_per_byte": total.bits_per_byte,
        },
        versions=library_versions(LIBRARIES),
    )
    world.from_main(artifact.write)  # and the others wait: the next stage reads it
    return artifact
