"""Train a model from scratch, or go on where an earlier run of the same recipe stopped."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact, identity_hash, library_versions
from largeformer.config.dry_run import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.parallel.environment import discover
from largeformer.stages import prepare
from largeformer.stages.claim import claim
from largeformer.stages.world import World, enter_world, reporting

if TYPE_CHECKING:
    from largeformer.tracking.tracker import FanOut
    from largeformer.training.trainer import Outcome, Training

STAGE = "pretrain"
LIBRARIES = ("largeformer", "torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact | None:
    """Train under `<output_dir>/pretrain`. Returns the artifact, or None where the run was asked to stop before its end."""
    folder = Path(recipe.run.output_dir) / STAGE
    with reporting(recipe, STAGE) as report:
        is_main = discover(os.environ).is_main
        prepared = prepare.run(recipe, fresh=fresh) if is_main else prepare.wait_or_load(recipe, fresh=fresh)
        with enter_world(recipe) as world:
            world.on_main(lambda: claim(folder, recipe, STAGE, fresh))
            artifact = Artifact.read(folder) or _train(recipe, world, prepared, folder)
        if artifact is None:
            report("requeue")
    return artifact


def _train(recipe: Recipe, world: World, prepared: Artifact, folder: Path) -> Artifact | None:
    from largeformer.training.trainer import fit

    training, tracker = assemble(recipe, world, prepared, folder)
    with ExitStack() as closing:
        closing.callback(lambda: tracker.close("failed"))
        outcome = fit(training)
        closing.pop_all()
    tracker.close("requeue" if outcome == "exit requested" else "finished")
    return None if outcome == "exit requested" else _finish(recipe, world, prepared, folder, training, outcome)


def assemble(recipe: Recipe, world: World, prepared: Artifact, folder: Path) -> tuple[Training, FanOut]:
    """Everything that `fit` works with, in the order in which one part needs another. Resumes where there is a checkpoint."""
    from largeformer.checkpoint.commit import locate, newest
    from largeformer.data.loader import Batches, fixed_batches
    from largeformer.data.ramp import BatchSizes
    from largeformer.data.splits import build_splits
    from largeformer.evaluation.perplexity import evaluate
    from largeformer.models.flops import flops_per_token, peak_flops
    from largeformer.models.gpt import build_gpt
    from largeformer.tracking.tracker import build_trackers
    from largeformer.training.checkpointing import Progress, TrainingState, load_training_state, load_weights, save_checkpoint
    from largeformer.training.early_stopping import EarlyStopping
    from largeformer.training.engine import build_engine
    from largeformer.training.metrics import Machine
    from largeformer.training.schedule import LearningRateSchedule
    from largeformer.training.trainer import Training

    train, groups, at = recipe.train, world.groups, world.groups.coordinates
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
    checkpoints = folder / "checkpoints"
    checkpoint = newest(checkpoints) or (locate(Path(recipe.checkpoint.load)) if recipe.checkpoint.load else None)
    chunks, shards = build_gpt(recipe, groups, world.device)
    if checkpoint is not None:
        load_weights(checkpoint, shards)
    engine = build_engine(recipe, chunks, shards, groups, world.deepspeed)
    state = load_training_state(checkpoint, engine) if checkpoint is not None else TrainingState(Progress())
    tracker = build_trackers(
        recipe.tracking,
        folder,
        recipe.run.name,
        {"recipe": recipe.model_dump(mode="json"), "deepspeed": world.deepspeed},
        resume_step=state.progress.step,
        total_steps=train.train_iters,
        wandb_run_id=state.wandb_run_id,
        enabled=world.info.is_main,
    )
    if checkpoint is not None:
        tracker.event("resumed", state.progress.step, checkpoint=checkpoint.name)
    early_stopping = EarlyStopping(train.early_stopping)
    if state.early_stopping:
        early_stopping.load_state_dict(state.early_stopping)
    validation = (train.eval_iters, train.global_batch_size, train.micro_batch_size, at.data, groups.layout.data)
    assert splits.train is not None and splits.valid is not None, "samples of both were asked for"
    valid = splits.valid
    training = Training(
        train=train,
        engine=engine,
        data=Batches(
            splits.train,
            train.micro_batch_size,
            at.data,
            groups.layout.data,
            batch_sizes=sizes.at,
            consumed_samples=state.progress.samples,
            num_workers=recipe.data.num_workers,
        ),
        schedule=LearningRateSchedule(recipe.optimizer, train.train_iters, recipe.warmup_iters),
        early_stopping=early_stopping,
        tracker=tracker,
        machine=Machine(
            flops_per_token(recipe.model, recipe.tokenizer.vocab_size), world.info.world_size, peak_flops(train.precision, world.device)
        ),
        device=world.device,
        validate=lambda: evaluate(chunks, fixed_batches(valid, *validation), groups, tokenizer.piece_bytes),
        save=lambda state: save_checkpoint(checkpoints, engine, state, recipe_yaml(recipe), recipe.checkpoint.keep_last),
        save_interval=recipe.checkpoint.save_interval,
        wandb_run_id=tracker.wandb_run_id,
        progress=state.progress,
    )
    return training, tracker


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
    return artifact.write() if world.info.is_main else artifact
