"""fp16 and its loss scale, trained for real, on the CPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.training.checkpointing import Progress
from largeformer.training.engine import StepResult
from largeformer.training.schedule import LearningRateSchedule
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2
from tests.training.engines import PP2, TP2_SP, Bench, Tensors, assert_same, bench_of, fp16_on_cpu, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
SCALE = 2.0**8

# world size, parallel section, DeepSpeed config, keys of the model
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, dict[str, Any]]] = {
    "one process": (1, {}, "zero1", {}),
    "DP2, ZeRO 1": (2, {}, "zero1", {}),
    "DP2, ZeRO 2": (2, {}, "zero2", {}),
    "DP2, ZeRO 3": (2, {}, "zero3", {}),
    "TP2 SP": (2, TP2_SP, "zero1", GPT2),
    "PP2": (2, PP2, "zero1", {}),
    "PP2 tied": (2, PP2, "zero1", GPT2),
}


def recipe_at(layout: str, precision: str = "fp16", **train: Any) -> tuple[int, Recipe]:
    world_size, parallel, zero, model = LAYOUTS[layout]
    scaler = {"initial_loss_scale_power": 8, "loss_scale_window": 3, "loss_scale_hysteresis": 2}
    return world_size, sgd_recipe(
        model={**model, "num_layers": 2, "init_method_std": 0.1},
        parallel=parallel,
        train={"precision": precision, "micro_batch_size": 2, "train_iters": 8, **scaler, **train},
        optimizer={"type": "adamw", "lr": 1e-2, "clip_grad": 1.0, "weight_decay": 0.1, "lr_warmup_iters": 6},
        deepspeed=f"ds_configs/{zero}.json",
    )


@contextlib.contextmanager
def overflowing(bench: Bench) -> Iterator[None]:
    """Within, one tensor's gradient is infinite, on the last rank only: in one stage, one shard, one data rank's part."""
    last = bench.groups.rank == bench.groups.layout.world_size - 1
    handle = bench.shards[0].parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf)) if last else None
    yield
    if handle is not None:
        handle.remove()


@dataclass(frozen=True)
class Run:
    """What this rank saw at each step, and what rank 0 gathered at the end. `scales`: after each step."""

    results: list[StepResult]
    rates: list[float]
    scales: list[float]
    progress: Progress
    weights: Tensors
    moments: Tensors
    scaler: dict[str, float | int]


def train(ranks: RankContext, recipe: Recipe, script: str, hold_scale: bool = False, scaler: dict[str, float | int] | None = None) -> Run:
    """A step for each letter of `script`: "." is good, "x" overflows. Good step n is of batch n and of the schedule's rate for the
    steps so far. `hold_scale` puts the loss scale back after each step; `scaler` is an earlier run's, to go on with."""
    schedule = LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters)
    progress, results, rates, scales = Progress(), [], [], []
    with fp16_on_cpu(), bench_of(ranks, recipe) as bench:
        bench.engine.restore_scaler(scaler or {})
        for letter in script:
            batches = bench.share(global_batch(recipe, seed=progress.next_optimizer_step))
            rates.append(schedule.at(progress.next_optimizer_step))
            with overflowing(bench) if letter == "x" else contextlib.nullcontext():
                results.append(bench.engine.train_step(batches, rates[-1]))
            progress = progress.after(results[-1], samples=0)
            scales.append(bench.engine.loss_scale)
            if hold_scale:
                bench.engine.wrapped.optimizer.loss_scaler.cur_scale = SCALE
        return Run(results, rates, scales, progress, bench.weights(), bench.moments("exp_avg"), bench.engine.scaler_state())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trains_as_fp32_does(ranks: Ranks, layout: str) -> None:
    runs = {}
    for precision in ("fp16", "fp32"):
        world_size, recipe = recipe_at(layout, precision)
        runs[precision] = ranks(world_size).run(train, recipe, ".....")
    for half, single in zip(runs["fp16"], runs["fp32"], strict=True):
        losses = [[result.loss for result in run.results] for run in (half, single)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-2)
        assert losses[0] != losses[1], "that was no fp16"
        assert [result.grad_norm for result in half.results] == pytest.approx([result.grad_norm for result in single.results], rel=2e-2)
        assert [result.loss_scale for result in half.results] == [SCALE, SCALE, SCALE, SCALE, 2 * SCALE]
        assert {result.loss_scale for result in single.results} == {1.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_leaves_no_trace(ranks: Ranks, layout: str) -> None:
    """Weights, moments and learning rates are those of a run in which the overflows never happened, to the last digit."""
    world_size, recipe = recipe_at(layout)
    runs = ranks(world_size).run(train, recipe, ".xx..x.", True)
    smooth = ranks(world_size).run(train, recipe, "....", True)
    for run, reference in zip(runs, smooth, strict=True):
        assert [result.skipped for result in run.results] == [False, True, True, False, False, True, False]
        assert [result.grad_norm is None for result in run.results] == [result.skipped for result in run.results]
        assert (run.progress.step, run.progress.skipped, run.progress.next_optimizer_step) == (7, 3, 5)
        taken = [index for index, result in enumerate(run.results) if not result.skipped]
        assert [run.rates[index] for index in taken] == reference.rates
        assert [run.results[index].loss for index in taken] == [result.loss for result in reference.results]
    assert_same(runs[0].weights, smooth[0].weights, 0)
    assert_same(runs[0].moments, smooth[0].moments, 0)


def accumulate(ranks: RankContext, recipe: Recipe) -> Tensors:
    """The gradients of one global batch, on rank 0."""
    with fp16_on_cpu(), bench_of(ranks, recipe) as bench:
        bench.engine.accumulate(bench.share(global_batch(recipe)))
        return bench.gradients()


@pytest.mark.parametrize("layout", ["PP2", "PP2 tied"])
def test_a_pipeline_accumulates_in_float32(ranks: Ranks, layout: str) -> None:
    """Stages compute what one process computes, digit by digit; only sums of micro batches in fp16 could tell them apart."""
    world_size, recipe = recipe_at(layout, micro_batch_size=1)
    alone = recipe.model_copy(update={"parallel": recipe_at("one process")[1].parallel})
    found, expected = ranks(world_size).run(accumulate, recipe)[0], ranks(1).run(accumulate, alone)[0]
    if recipe.model.tie_embeddings:  # whose two gradients one process adds in fp16 for each micro batch
        name = "embedding.word_embeddings.weight"
        assert_same({name: found.pop(name)}, {name: expected.pop(name)}, 1e-3)
    assert_same(found, expected, 1e-5)


# Scale after each step, in units of the initial one: the second overflow halves it, and so does each one more, until as many
# good steps as the window (3) have gone by: then the next good one doubles it, and the first overflow is free again.
SCALES: dict[str, list[float]] = {
    "x.": [1, 1],
    "xxx": [1, 0.5, 0.25],
    "x.x.": [1, 1, 0.5, 0.5],
    ".......": [1, 1, 1, 2, 2, 2, 4],
    "xx....xx": [1, 0.5, 0.5, 0.5, 0.5, 1, 1, 0.5],
}


@pytest.mark.parametrize("script", SCALES)
def test_the_scale_follows_overflows(ranks: Ranks, script: str) -> None:
    world_size, recipe = recipe_at("DP2, ZeRO 1")
    for run in ranks(world_size).run(train, recipe, script):
        assert [scale / SCALE for scale in run.scales] == SCALES[script]
        assert [result.loss_scale for result in run.results] == [SCALE, *run.scales[:-1]], "each step used the scale before it"


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_a_new_engine_goes_on_with_the_scaler_it_is_given(ranks: Ranks, cut: int) -> None:
    script = "xx....xx"
    _, recipe = recipe_at("one process")
    before: Run = ranks(1).run(train, recipe, script[:cut])[0]
    saved = json.loads(json.dumps(before.scaler))
    after: Run = ranks(1).run(train, recipe, script[cut:], False, saved)[0]
    assert [scale / SCALE for scale in (*before.scales, *after.scales)] == SCALES[script]


def test_a_fixed_scale_stays_and_still_skips(ranks: Ranks) -> None:
    _, recipe = recipe_at("one process", loss_scale=64.0)
    run: Run = ranks(1).run(train, recipe, ".x.")[0]
    assert run.scales == [64.0, 64.0, 64.0]
    assert [result.skipped for result in run.results] == [False, True, False]


def test_the_smallest_scale_skips_like_any_other(ranks: Ranks) -> None:
    """The guards say how many may be skipped, not DeepSpeed's scaler."""
    _, recipe = recipe_at("one process", initial_loss_scale_power=1)
    (run,) = ranks(1).run(train, recipe, "xxxxxx.")
    assert [result.skipped for result in run.results] == [True] * 6 + [False]
    assert run.scales[3:] == [1.0] * 4


SCALERS = {
    "a static scale stays what the recipe says": ({"loss_scale": 128.0}, {"cur_scale": 2.0**32, "cur_iter": 9}, 128.0),
    "from a static scale a moving one starts anew": ({}, {"cur_scale": 2.0**32}, SCALE),
    "a moving one goes on": ({}, {"cur_scale": 16.0, "cur_iter": 9, "last_overflow_iter": 8, "cur_hysteresis": 2}, 16.0),
}


@pytest.mark.parametrize(("section", "saved", "expected"), SCALERS.values(), ids=SCALERS)
def test_which_scale_a_run_goes_on_with(ranks: Ranks, section: dict[str, Any], saved: dict[str, float | int], expected: float) -> None:
    _, recipe = recipe_at("one process", **section)
    (run,) = ranks(1).run(train, recipe, ".", False, saved)
    assert run.results[0].loss_scale == expected and not run.results[0].skipped
