"""The training loop, on one screen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from largeformer.config.schema import TrainConfig
from largeformer.evaluation.perplexity import LossTotal
from largeformer.parallel.batch import Batch
from largeformer.tracking.tracker import Tracker
from largeformer.training.checkpointing import Progress, Stateful, TrainingState
from largeformer.training.early_stopping import EarlyStopping
from largeformer.training.engine import Engine, StepResult
from largeformer.training.guards import Guards
from largeformer.training.metrics import Machine, StepMetrics, peak_memory_gib
from largeformer.training.schedule import LearningRateSchedule

Outcome = Literal["finished", "stopped early", "exit requested", "stopped", "rewind"]
"""`exit requested`: by `exit_iteration`; `stopped`: by a signal or `exit_duration_minutes`; `rewind`: to the newest checkpoint, unsaved."""


class BatchSource(Protocol):
    """This data rank's micro batches of one global batch after another."""

    @property
    def consumed_samples(self) -> int: ...

    def next(self) -> list[Batch]: ...


class Checkpointer(Protocol):
    """Where the run is saved. Every call is collective; `poll` costs nothing while no save is under way."""

    def save(self, state: TrainingState) -> None:
        """Begin a checkpoint; it may be finished by a later `poll`. One that fails is told, and training goes on."""

    def poll(self) -> None:
        """At a step boundary: finish what was written meanwhile."""

    def finish(self, *, last_counts: bool) -> None:
        """Wait for what is under way. Raises RuntimeError where the last checkpoint is not on disk, if the run is to end with it."""


@dataclass
class Training:
    """A run, assembled: what `fit` works with. `parts` are kept in checkpoints, by name. Only `progress`, `validation` and `engine` change
    as it goes on. `sample` continues the recipe's prompts: pairs of prompt and text. `figures`: further columns
    of the training row; collective."""

    train: TrainConfig
    engine: Engine
    data: BatchSource
    schedule: LearningRateSchedule
    early_stopping: EarlyStopping
    tracker: Tracker
    guards: Guards
    machine: Machine
    device: torch.device
    validate: Callable[[], LossTotal]
    checkpoints: Checkpointer
    save_interval: int | None
    sample: Callable[[], Sequence[tuple[str, str]]] = tuple
    wandb_run_id: str | None = None
    progress: Progress = field(default_factory=Progress)
    validation: dict[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Stateful] = field(default_factory=dict)
    figures: Callable[[], Mapping[str, float]] = dict


def fit(run: Training) -> Outcome:
    """Train until `train_iters`, early stopping, a requested exit or a guard's objection; validate, save and report on the way."""
    watch, guards = _StopWatch(run), run.guards
    started_at, last = run.progress.step, min(run.train.train_iters, run.train.exit_iteration or run.train.train_iters)
    outcome: Outcome | None = "stopped early" if run.early_stopping.exhausted else guards.interruption(minutes=0.0)
    while outcome is None and run.progress.step < last:
        lr, begin = run.schedule.at(run.progress.next_optimizer_step), run.data.consumed_samples
        with guards.step(run.progress.step + 1, first=run.progress.step == started_at):
            result = run.engine.train_step(_on_device(run.data.next(), run.device), lr)
        run.progress = run.progress.after(result, run.data.consumed_samples)
        watch.lap(result, lr)
        with guards.watchdog.suspended("a checkpoint"):
            run.checkpoints.poll()
        if _due(run, run.train.log_interval):
            watch.report()
        guards.after_step(run.progress.step, result, (begin, run.progress.samples))
        if _due(run, run.train.eval_interval) and _validate(run, watch):
            outcome = "stopped early"
        elif run.progress.step < last:
            outcome = guards.interruption(watch.minutes)
        if outcome is None and run.save_interval and run.progress.step % run.save_interval == 0 and run.progress.step < last:
            _save(run, watch)
    if outcome != "rewind" and run.progress.step > started_at:
        _save(run, watch)
    with guards.watchdog.suspended("the last checkpoint"):
        run.checkpoints.finish(last_counts=outcome != "rewind")
    return outcome or ("finished" if run.progress.step >= run.train.train_iters else "exit requested")


def _due(run: Training, interval: int) -> bool:
    return run.progress.step % interval == 0 or run.progress.step == run.train.train_iters


def _validate(run: Training, watch: _StopWatch) -> bool:
    """Returns whether to stop early."""
    run.guards.watchdog.beat(f"the validation after step {run.progress.step}")
    with watch.paused():
        total, texts = run.validate(), run.sample()
    row = {"val_loss": total.loss, "val_bits_per_byte": total.bits_per_byte}
    run.validation = {"step": run.progress.step, **row}
    run.tracker.log(run.validation)
    for prompt, text in texts:
        run.tracker.sample(run.progress.step, prompt, text)
    stop = run.early_stopping.update(row[run.early_stopping.metric], run.progress.step)
    if stop:
        run.tracker.event("stopped early", run.progress.step, metric=run.early_stopping.metric, best=run.early_stopping.best)
    return stop


def _save(run: Training, watch: _StopWatch) -> None:
    parts = {name: part.state_dict() for name, part in run.parts.items()}
    with watch.paused(), run.guards.watchdog.suspended(f"the checkpoint of step {run.progress.step}"):
        run.checkpoints.save(TrainingState(run.progress, run.early_stopping.state_dict(), run.wandb_run_id, run.validation, parts))


def _on_device(batches: Sequence[Batch], device: torch.device) -> list[Batch]:
    return [batch.to(device) for batch in batches]


class _StopWatch:
    """Times steps, without what happens between them, and reports a row at a time."""

    def __init__(self, run: Training) -> None:
        self._run = run
        self._started = self._last = time.monotonic()
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
        self._result: StepResult | None = None
        self._lr = 0.0

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._started) / 60

    def lap(self, result: StepResult, lr: float) -> None:
        now = time.monotonic()
        self._steps, self._seconds, self._tokens = self._steps + 1, self._seconds + now - self._last, self._tokens + result.tokens
        self._result, self._lr, self._last = result, lr, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield
        self._last = time.monotonic()

    def report(self) -> None:
        run, result = self._run, self._result
        assert result is not None, "there was a lap"
        metrics = StepMetrics(
            step=run.progress.step,
            samples=run.progress.samples,
            tokens=run.progress.tokens,
            loss=result.loss,
            lr=self._lr,
            grad_norm=result.grad_norm,
            loss_scale=result.loss_scale if run.train.precision == "fp16" else None,
            skipped=run.progress.skipped,
            step_time_s=self._seconds / self._steps,
            step_tokens=self._tokens / self._steps,
            memory_gib=run.engine.groups.largest(peak_memory_gib(run.device)),
        )
        run.tracker.log({**metrics.row(run.machine), **run.figures()})
        self._steps, self._seconds, self._tokens = 0, 0.0, 0
