"""`fit` with a real engine on one rank and the real `metrics.jsonl`: what happens at which step, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.evaluation.perplexity import LossTotal
from largeformer.parallel.batch import Batch
from largeformer.tracking.jsonl import JsonlTracker
from largeformer.training.checkpointing import Progress, TrainingState
from largeformer.training.early_stopping import EarlyStopping
from largeformer.training.guards import build_guards
from largeformer.training.metrics import Machine
from largeformer.training.schedule import LearningRateSchedule
from largeformer.training.trainer import Training, fit
from tests.distributed import RankContext, RankPool
from tests.training.engines import Bench, bench_of, fp16_on_cpu, global_batch, sgd_recipe
from tests.training.test_metrics import COLUMNS

Ranks = Callable[[int], RankPool]
ITERS = 5


@dataclass
class Source:
    """Global batch number n is that of seed n, whoever asks."""

    bench: Bench
    consumed_samples: int = 0

    def next(self) -> list[Batch]:
        size = self.bench.recipe.train.global_batch_size
        batch = global_batch(self.bench.recipe, seed=self.consumed_samples // size)
        self.consumed_samples += size
        return self.bench.share(batch)


@dataclass
class Saved:
    """Stands in for the checkpoints, which are tested with their own files in tests/checkpoint. What is asked for is saved at the next
    poll, as behind the training."""

    tracker: JsonlTracker
    asked: list[TrainingState] = field(default_factory=list)
    states: list[TrainingState] = field(default_factory=list)

    def save(self, state: TrainingState) -> None:
        self.asked.append(state)

    def poll(self) -> None:
        for state in self.asked:
            self.tracker.event("saved", state.progress.step)
        self.states += self.asked
        self.asked.clear()

    def finish(self, *, last_counts: bool) -> None:
        self.poll()


@dataclass(frozen=True)
class Fitted:
    outcome: str
    states: list[TrainingState]


def recipe_with(**train: Any) -> Recipe:
    keys = {"train_iters": ITERS, "micro_batch_size": 2, "global_batch_size": 4, "eval_interval": 100, **train}
    return sgd_recipe(train=keys, optimizer={"type": "adamw", "lr": 1e-2, "lr_warmup_iters": 3}, deepspeed="ds_configs/zero1.json")


def run_fit(
    ranks: RankContext,
    recipe: Recipe,
    folder: Path,
    save_interval: int | None = None,
    losses: Sequence[float] = (),
    start: TrainingState | None = None,
) -> Fitted:
    """`losses`: what the validations find, one after another; then 1."""
    state = start or TrainingState(Progress())
    found = iter(losses)
    stopping = EarlyStopping(recipe.train.early_stopping)
    if state.early_stopping:
        stopping.load_state_dict(state.early_stopping)
    with fp16_on_cpu(), bench_of(ranks, recipe) as bench:
        tracker = JsonlTracker(folder, state.progress.step)
        saved = Saved(tracker)
        training = Training(
            train=recipe.train,
            engine=bench.engine,
            data=Source(bench, state.progress.samples),
            schedule=LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters),
            early_stopping=stopping,
            tracker=tracker,
            guards=build_guards(recipe, bench.engine, tracker, folder),
            machine=Machine(flops_per_token=1e6, devices=1, peak_flops=1e12),
            device=torch.device("cpu"),
            validate=lambda: LossTotal(loss_sum=10 * next(found, 1.0), tokens=10, bytes=40),
            checkpoints=saved,
            save_interval=save_interval,
            progress=state.progress,
        )
        outcome = fit(training)
        tracker.close("finished")
    return Fitted(outcome, saved.states)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return _lines(folder / "metrics.jsonl")


def events_in(folder: Path) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in _lines(folder / "events.jsonl")]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Timetable:
    """Keys of `train`, save interval and step of the start; then the steps that are logged, validated and saved, and the end."""

    train: dict[str, Any]
    save_interval: int | None
    start: int
    logged: list[int]
    validated: list[int]
    saved: list[int]
    outcome: str = "finished"


TIMETABLES: dict[str, Timetable] = {
    "the last step is always due": Timetable({"log_interval": 2, "eval_interval": 3}, 4, 0, [2, 4, 5], [3, 5], [4, 5]),
    "no step is saved twice": Timetable({"eval_interval": 5}, 5, 0, [1, 2, 3, 4, 5], [5], [5]),
    "without a save interval the end is saved": Timetable({}, None, 0, [1, 2, 3, 4, 5], [5], [5]),
    "exit_iteration": Timetable({"exit_iteration": 3, "eval_interval": 2}, 1, 0, [1, 2, 3], [2], [1, 2, 3], "exit requested"),
    "exit_iteration beyond the end": Timetable({"exit_iteration": 9}, None, 0, [1, 2, 3, 4, 5], [5], [5]),
    "exit_iteration at the end": Timetable({"exit_iteration": ITERS}, None, 0, [1, 2, 3, 4, 5], [5], [5]),
    "resumed": Timetable({"eval_interval": 4}, 2, 2, [3, 4, 5], [4, 5], [4, 5]),
    "resumed before exit_iteration": Timetable({"exit_iteration": 4}, None, 3, [4], [], [4], "exit requested"),
    "resumed at exit_iteration": Timetable({"exit_iteration": 3}, 1, 3, [], [], [], "exit requested"),
    "resumed beyond exit_iteration": Timetable({"exit_iteration": 2}, 1, 3, [], [], [], "exit requested"),
    "resumed at the end": Timetable({}, 1, ITERS, [], [], []),
    "time is up after one step": Timetable({"exit_duration_minutes": 1e-9}, None, 0, [1], [], [1], "stopped"),
    "time enough": Timetable({"exit_duration_minutes": 1e9}, None, 0, [1, 2, 3, 4, 5], [5], [5]),
}


@pytest.mark.parametrize("name", TIMETABLES)
def test_what_happens_when(ranks: Ranks, tmp_path: Path, name: str) -> None:
    table = TIMETABLES[name]
    recipe = recipe_with(**table.train)
    start = TrainingState(Progress(step=table.start, samples=4 * table.start, tokens=100 * table.start))
    fitted: Fitted = ranks(1).run(run_fit, recipe, tmp_path, table.save_interval, (), start)[0]
    rows = rows_in(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == table.logged
    assert [row["step"] for row in rows if "val_loss" in row] == table.validated
    assert [state.progress.step for state in fitted.states] == table.saved
    assert events_in(tmp_path) == [("saved", step) for step in table.saved]
    assert fitted.outcome == table.outcome


def plain_steps(ranks: RankContext, recipe: Recipe, rates: list[float]) -> list[tuple[float, float | None, int]]:
    """The same steps by the engine alone: loss, norm, tokens."""
    with bench_of(ranks, recipe) as bench:
        source = Source(bench)
        results = [bench.engine.train_step(source.next(), lr) for lr in rates]
        return [(result.loss, result.grad_norm, result.tokens) for result in results]


def test_rows_are_what_the_engine_did(ranks: Ranks, tmp_path: Path) -> None:
    """Columns as documented; losses to the last digit; the rate warms up to 1e-2 in three steps, then falls along a cosine."""
    recipe = recipe_with(log_interval=2, eval_interval=4)
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2, 0.5e-2, 0.0]
    expected = ranks(1).run(plain_steps, recipe, rates)[0]
    ranks(1).run(run_fit, recipe, tmp_path, None, (2.5, 2.25))
    rows = rows_in(tmp_path)
    assert [list(row) for row in rows] == [
        COLUMNS,
        COLUMNS,
        ["step", "val_loss", "val_bits_per_byte"],
        COLUMNS,
        ["step", "val_loss", "val_bits_per_byte"],
    ]
    trained = [row for row in rows if "loss" in row]
    for row in trained:
        loss, norm, _ = expected[row["step"] - 1]
        assert (row["loss"], row["grad_norm"]) == (loss, norm)
        assert row["lr"] == pytest.approx(rates[row["step"] - 1], abs=1e-12)
        assert row["samples"] == 4 * row["step"]
        assert row["tokens"] == sum(tokens for *_, tokens in expected[: row["step"]])
        assert row["tflops_per_device"] == pytest.approx(row["tokens_per_s"] / 1e6)
        assert (row["loss_scale"], row["skipped"]) == (None, 0)
    for before, row in zip([{"tokens": 0, "step": 0}, *trained], trained, strict=False):
        steps, tokens = row["step"] - before["step"], row["tokens"] - before["tokens"]
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(tokens / steps), "rates are means since the last row"
    validated = [(row["val_loss"], row["val_bits_per_byte"]) for row in rows if "val_loss" in row]
    assert validated == [(2.5, pytest.approx(25 / 0.6931471805599453 / 40)), (2.25, pytest.approx(22.5 / 0.6931471805599453 / 40))]


def test_stops_early_and_remembers_when_resumed(ranks: Ranks, tmp_path: Path) -> None:
    stopping = {"patience": 2, "min_delta": 0.1}
    recipe = recipe_with(train_iters=20, eval_interval=1, log_interval=20, early_stopping=stopping)
    whole: Fitted = ranks(1).run(run_fit, recipe, tmp_path / "whole", None, (3.0, 2.0, 1.95, 1.95, 1.0))[0]
    assert whole.outcome == "stopped early"
    assert [state.progress.step for state in whole.states] == [4]
    assert events_in(tmp_path / "whole") == [("stopped early", 4), ("saved", 4)]

    part = recipe_with(train_iters=20, eval_interval=1, log_interval=20, early_stopping=stopping, exit_iteration=3)
    first: Fitted = ranks(1).run(run_fit, part, tmp_path / "parts", None, (3.0, 2.0, 1.95))[0]
    second: Fitted = ranks(1).run(run_fit, recipe, tmp_path / "parts", None, (1.95, 1.0), first.states[-1])[0]
    assert (first.outcome, second.outcome) == ("exit requested", "stopped early")
    assert second.states == whole.states


def test_early_stopping_goes_before_the_clock(ranks: Ranks, tmp_path: Path) -> None:
    """Both at one step: training is over, not to be resumed."""
    recipe = recipe_with(eval_interval=1, early_stopping={"patience": 1}, exit_duration_minutes=1e-9)
    start = TrainingState(Progress(step=2, samples=8), {"best": 0.5, "bad_validations": 0})
    fitted: Fitted = ranks(1).run(run_fit, recipe, tmp_path, None, (), start)[0]
    assert fitted.outcome == "stopped early"


def test_every_skipped_step_is_an_event_and_the_rate_waits(ranks: Ranks, tmp_path: Path) -> None:
    """A loss scale of 2^32 overflows at once, and is halved each time; nothing is learnt, so the rate stays that of the first step."""
    recipe = recipe_with(precision="fp16", initial_loss_scale_power=32, loss_scale_hysteresis=1, log_interval=2)
    fitted: Fitted = ranks(1).run(run_fit, recipe, tmp_path)[0]
    assert events_in(tmp_path) == [*(("skipped", step) for step in range(1, ITERS + 1)), ("saved", ITERS)]
    rows = [row for row in rows_in(tmp_path) if "loss" in row]
    assert [(row["step"], row["skipped"], row["grad_norm"]) for row in rows] == [(2, 2, None), (4, 4, None), (5, 5, None)]
    assert [row["loss_scale"] for row in rows] == [2.0**31, 2.0**29, 2.0**28]
    assert {row["lr"] for row in rows} == {1e-2 / 3}
    assert fitted.states[-1].progress.next_optimizer_step == 1
