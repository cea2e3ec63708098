"""A stage that trains: assembled from the recipe, gone on with where it was interrupted, finished with an artifact.

Pretraining, distillation, gradual pruning and quantization-aware training differ in where their weights come from, what is done to the
model before the engine takes it, and what accompanies the batches: that is a `TrainingJob`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact, library_versions
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import StageFailed
from largeformer.stages.common import interruptions, prepared_data
from largeformer.stages.common.feeding import build_feed, samples_to_train_on
from largeformer.stages.common.planned import plan_errors, planned_columns
from largeformer.stages.common.sampling import build_sampler
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.checkpoint.verify import Found
    from largeformer.models.gpt import GPT
    from largeformer.models.shards import Shard
    from largeformer.tracking.tracker import FanOut
    from largeformer.training.checkpointing import Stateful, TrainingState
    from largeformer.training.engine import Engine
    from largeformer.training.metrics import Machine
    from largeformer.training.trainer import BatchSource, Outcome, Training

LIBRARIES = ("largeformer", "torch", "deepspeed", "megatron-core", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Accompanied:
    """The batches with what accompanies them, and what of it checkpoints must keep. figures: further columns of the training row, alike on
    every rank; collective."""

    data: BatchSource
    parts: dict[str, Stateful] = field(default_factory=dict)
    figures: Callable[[], Mapping[str, float]] = dict


@dataclass(frozen=True)
class TrainingJob:
    """What a training stage does, and how it differs from pretraining.

    kind, folder (named as the stage's entry is), identity, parents (by the names that the manifest gives them): of the artifact that it
    ends with. continues: another stage's training that it goes on with, optimizer and progress too, while it has no checkpoint of its own;
    behind: the steps and samples of that. start: a checkpoint whose weights it begins with, with a fresh optimizer; without both, they are
    initialised from the seed. named: what a weight is called in there. extend: gives this rank's chunks parameters that are trained along
    and kept in checkpoints, and belong to no model; what they hold. alter: called with the chunks and the model's shards, their weights
    loaded, before the engine takes them: masks, another loss, fake quantization. accompany: called with the engine and the batches; what
    it returns is read in their place, so it sees each global batch before the step. measure: further figures for the manifest, once
    training has ended.
    """

    kind: str
    folder: Path
    identity: str
    prepared: Artifact
    parents: Mapping[str, Artifact] = field(default_factory=dict)
    start: Path | None = None
    alter: Callable[[Sequence[GPT], Sequence[Shard]], None] = lambda chunks, shards: None
    accompany: Callable[[Engine, BatchSource], Accompanied] = lambda engine, data: Accompanied(data)
    measure: Callable[[Training], dict[str, Any]] = lambda training: {}
    named: Callable[[str], str] = str
    extend: Callable[[Sequence[GPT]], Sequence[Shard]] = lambda chunks: ()
    continues: Found | None = None
    behind: tuple[int, int] = (0, 0)


def train(recipe: Recipe, world: World, job: TrainingJob, cut_short: str | None) -> Artifact | None:
    """Train to the end; None where `exit_iteration` came before it. Raises StopRequested where a signal or the clock did. `cut_short`: how
    the process before this one ended, which its record may not hold (`interruptions.cut_short`)."""
    ended = _attempt(recipe, world, job, cut_short=cut_short)
    while isinstance(ended, _Rewound):
        _free(world)
        ended = _attempt(recipe, world, job, before=ended)
    return ended


def _free(world: World) -> None:
    """Give back the memory of an attempt that is over: an engine refers to itself, and is there until somebody looks."""
    import torch

    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class _Rewound:
    """An attempt after which all is built anew, from an earlier checkpoint."""

    wandb_run_id: str | None


def _attempt(
    recipe: Recipe, world: World, job: TrainingJob, *, cut_short: str | None = None, before: _Rewound | None = None
) -> Artifact | _Rewound | None:
    """Train from the newest checkpoint to the end, or to where all is to be built anew from an earlier one. `cut_short`, `before`: how the
    attempt before this one ended, which its record may not hold any more."""
    from largeformer.training.rewind import read_rewinds
    from largeformer.training.trainer import fit

    training, tracker = _assemble(recipe, world, job, before.wandb_run_id if before is not None else None)
    began_at = training.progress
    with ExitStack() as closing, training.guards.watchdog:
        closing.callback(lambda: tracker.close("failed"))
        if cut_short is not None:
            tracker.event("cut short", training.progress.step, reason=cut_short)
        if before is not None:
            made = asdict(read_rewinds(job.folder)[-1])
            tracker.event("rewound", made.pop("step"), **made)
        outcome = fit(training)
        stop = interruptions.stop(training.guards, tracker, training.progress.step) if outcome == "stopped" else None
        done = outcome in ("finished", "stopped early")
        artifact = _finish(world, job, training, outcome) if done else None
        closing.pop_all()
    if artifact is not None:
        tracker.artifact(artifact, [job.prepared, *job.parents.values()])
    tracker.close("finished" if done else "requeue")
    if stop is not None:
        raise stop
    if outcome == "rewind":
        interruptions.rewind(world, job.folder, training.guards, began_at, recipe.guards.rewind_steps * recipe.train.global_batch_size)
    training.engine.close()  # the next stage needs the memory
    return _Rewound(tracker.wandb_run_id) if outcome == "rewind" else artifact


def _assemble(recipe: Recipe, world: World, job: TrainingJob, wandb_run_id: str | None) -> tuple[Training, FanOut]:
    """Everything that `fit` works with, in the order in which one part needs another. Resumes where there is a checkpoint. `wandb_run_id`:
    of this run, where a checkpoint need not say it."""
    from largeformer.models.gpt import build_gpt
    from largeformer.training.checkpointing import Progress, TrainingState, load_training_state, load_weights
    from largeformer.training.early_stopping import EarlyStopping
    from largeformer.training.engine import build_engine
    from largeformer.training.guards import build_guards
    from largeformer.training.rewind import LeavingOut, read_rewinds
    from largeformer.training.saving import Checkpoints, retention_policy
    from largeformer.training.schedule import LearningRateSchedule
    from largeformer.training.trainer import Training

    checkpoints, rewinds = job.folder / "checkpoints", world.from_main(lambda: read_rewinds(job.folder))
    found = _resume_from(checkpoints, recipe.checkpoint.verify == "sha256", job.continues, world)
    checkpoint = found.checkpoint if found is not None else None
    chunks, shards = build_gpt(recipe, world.groups, world.device)
    further = job.extend(chunks)
    if checkpoint is not None:
        load_weights(checkpoint, [*shards, *further])
    elif job.start is not None:
        load_weights(job.start, shards, job.named)
    job.alter(chunks, shards)
    engine = build_engine(recipe, chunks, [*shards, *further], world.groups, world.deepspeed)
    state = load_training_state(checkpoint, engine, recipe.run.seed) if checkpoint is not None else TrainingState(Progress())
    if found is not None and found is job.continues:  # another run's: its record, its patience and its spikes are its own
        extra = {name: kept for name, kept in state.extra.items() if name != "guards"}
        state = replace(state, wandb_run_id=None, early_stopping={}, extra=extra)
    state = replace(state, wandb_run_id=state.wandb_run_id or wandb_run_id)
    text = prepared_data.CutBy(job.prepared, job.folder)
    state.restore({"text": text})
    tracker = _tracker(recipe, world, job, state, found)
    guards = build_guards(
        recipe,
        engine,
        tracker,
        job.folder,
        may_rewind=recipe.guards.rewinds and not rewinds,
        stopping=interruptions.announcer(recipe, job.folder.name),
        hanging=interruptions.hanging(recipe, job.folder.name),
    )
    feed = build_feed(recipe, world, job.prepared, chunks, guards.watchdog, samples_to_train_on(recipe, *job.behind))
    accompanied = job.accompany(engine, LeavingOut(feed.open_at, state.progress.samples, rewinds))
    training = Training(
        train=recipe.train,
        engine=engine,
        data=accompanied.data,
        schedule=LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters),
        early_stopping=EarlyStopping.restored(recipe.train.early_stopping, state.early_stopping),
        tracker=tracker,
        guards=guards,
        machine=_machine(recipe, world),
        device=world.device,
        validate=feed.validate,
        sample=build_sampler(recipe, world, job.prepared, chunks, guards.watchdog),
        checkpoints=Checkpoints(checkpoints, engine, tracker, recipe_yaml(recipe), recipe.checkpoint, retention_policy(recipe)),
        save_interval=recipe.checkpoint.save_interval,
        wandb_run_id=tracker.wandb_run_id,
        progress=state.progress,
        validation=state.validation,
        parts={"text": text, "guards": guards, **feed.parts, **accompanied.parts},
        figures=accompanied.figures,
    )
    state.restore(training.parts)
    return training, tracker


def _resume_from(checkpoints: Path, hashes: bool, continues: Found | None, world: World) -> Found | None:
    """The newest valid checkpoint of this stage, else the one that the job continues. Damaged ones of this stage are set aside: they would
    be in the way of the next."""
    from largeformer.checkpoint.commit import committed, set_aside, tidy
    from largeformer.checkpoint.verify import find

    def own() -> bool:
        tidy(checkpoints)
        return bool(committed(checkpoints))

    if not world.from_main(own):
        return continues
    found = find(checkpoints, hashes)
    world.from_main(lambda: [set_aside(refused.checkpoint) for refused in found.refused])
    return found


def _tracker(recipe: Recipe, world: World, job: TrainingJob, state: TrainingState, found: Found | None) -> FanOut:
    from largeformer.parallel.cpu_products import converts
    from largeformer.tracking.build import build_trackers
    from largeformer.tracking.provenance import git_state

    tracker = build_trackers(
        recipe.tracking,
        job.folder,
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
    if converts(recipe.train.precision, world.device):
        advice = "this CPU has no instructions for bf16; train.precision=fp32 is faster here"
        tracker.event("bf16 products in fp32", state.progress.step, reason=advice)
    if found is not None:
        for refused in found.refused:
            tracker.event("checkpoint damaged", state.progress.step, checkpoint=refused.checkpoint.name, reasons=refused.problems)
        tracker.event("resumed", state.progress.step, checkpoint=found.checkpoint.name)
    return tracker


def _machine(recipe: Recipe, world: World) -> Machine:
    """What MFU is measured against. Rank 0 measures a CPU, with its share of the cores: ranks would disturb each other."""
    from largeformer.models.flops import flops_per_token, peak_flops
    from largeformer.training.metrics import Machine

    per_token = flops_per_token(recipe.model, recipe.tokenizer.vocab_size)
    peak = world.from_main(lambda: peak_flops(recipe.train.precision, world.device))
    return Machine(per_token, world.info.world_size, peak, planned_columns(recipe, world, peak))


def _finish(world: World, job: TrainingJob, training: Training, outcome: Outcome) -> Artifact:
    total = training.validate()
    if not math.isfinite(total.loss):
        raise StageFailed([f"the validation loss after the last step is {total.loss}: the training diverged; lower optimizer.lr"])
    with training.guards.watchdog.suspended("the figures of the stage"):
        figures = {**job.measure(training), **world.from_main(lambda: plan_errors(job.folder / "metrics.jsonl"))}
    artifact = Artifact(
        kind=job.kind,
        path=job.folder,
        identity=job.identity,
        parents={name: parent.identity for name, parent in {job.prepared.kind: job.prepared, **job.parents}.items()},
        metrics={
            "outcome": outcome,
            "steps": training.progress.step,
            "tokens": training.progress.tokens,
            "val_loss": total.loss,
            **prepared_data.tokenizer_of(job.prepared),
            "val_bits_per_byte": total.bits_per_byte,
            **figures,
        },
        versions=library_versions(LIBRARIES),
    )
    world.from_main(artifact.write)  # and the others wait: the next stage reads it
    return artifact
