"""2 N steps in one run against N steps, a checkpoint, everything built anew, and N more: the same digits, in fp32 on the CPU.

Dropout is on and the data are shuffled, so that the random states and the place in the data count too. Every step is saved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from largeformer.checkpoint.verify import find
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.config.schema import Recipe
from largeformer.data.loader import Batches, Reading
from largeformer.data.splits import MockSamples
from largeformer.parallel.device import rng_states
from largeformer.tracking.tracker import FanOut
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state, read_state
from largeformer.training.saving import Checkpoints, retention_policy
from largeformer.training.schedule import LearningRateSchedule
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2
from tests.training.engines import PP2, TP2, TP2_SP, Bench, Tensors, assert_same, bench_of, sgd_recipe

Ranks = Callable[[int], RankPool]
N = 3
MOMENTS = {"adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}

# world size, parallel section, DeepSpeed config, optimizer, precision, keys of the model
CASES: dict[str, tuple[int, dict[str, Any], str, str, str, dict[str, Any]]] = {
    "one process": (1, {}, "zero0", "adamw", "fp32", {}),
    "one process, SGD": (1, {}, "zero0", "sgd", "fp32", {}),
    "ZeRO 1, tied with biases": (1, {}, "zero1", "adam", "fp32", GPT2),
    "DP2": (2, {}, "zero0", "adamw", "fp32", {}),
    "DP2, ZeRO 1": (2, {}, "zero1", "adamw", "fp32", {}),
    "DP2, ZeRO 1, SGD": (2, {}, "zero1", "sgd", "fp32", {}),
    "DP2, ZeRO 2": (2, {}, "zero2", "adamw", "fp32", {}),
    "DP2, ZeRO 3": (2, {}, "zero3", "adamw", "fp32", {}),
    "DP2, ZeRO 3, SGD": (2, {}, "zero3", "sgd", "fp32", {}),
    "TP2": (2, TP2, "zero0", "adamw", "fp32", {}),
    "TP2 SP, tied with biases": (2, TP2_SP, "zero1", "adamw", "fp32", GPT2),
    "PP2": (2, PP2, "zero0", "adamw", "fp32", {}),
    "PP2 tied, ZeRO 1": (2, PP2, "zero1", "adamw", "fp32", GPT2),
    "PP2, 2 virtual stages": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, "zero1", "adamw", "fp32", {"num_layers": 4}),
    "bf16": (1, {}, "zero1", "adamw", "bf16", {}),
    "bf16, DP2, ZeRO 1": (2, {}, "zero1", "adamw", "bf16", {}),
    "bf16, DP2, ZeRO 3": (2, {}, "zero3", "adamw", "bf16", {}),
    "bf16, PP2 tied": (2, PP2, "zero1", "adamw", "bf16", GPT2),
}


@dataclass(frozen=True)
class End:
    """What a run ends with, on this rank; the tensors are gathered on rank 0."""

    losses: list[float]
    samples: list[tuple[int, ...]]
    draws: list[float]
    progress: Progress
    weights: Tensors
    moments: dict[str, Tensors]
    random: Tensors


def recipe_of(case: str) -> tuple[int, Recipe]:
    world_size, parallel, zero, optimizer, precision, model = CASES[case]
    recipe = sgd_recipe(
        model={"num_layers": 2, "init_method_std": 0.1, **model, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        parallel=parallel,
        train={"precision": precision, "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 2 * N},
        optimizer={"type": optimizer, "lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "clip_grad": 1.0, "lr_warmup_iters": 2},
        deepspeed=f"ds_configs/{zero}.json",
    )
    return world_size, recipe


def train(ranks: RankContext, recipe: Recipe, steps: int, folder: Path, resume: bool) -> End:
    """`steps` steps, from the start or from the newest checkpoint in `folder`, each saved there."""
    checkpoint = find(folder).checkpoint if resume else None
    with bench_of(ranks, recipe, weights_from=checkpoint) as bench:
        progress = load_training_state(checkpoint, bench.engine).progress if checkpoint else Progress()
        checkpoints = Checkpoints(folder, bench.engine, FanOut(), "", recipe.checkpoint, retention_policy(recipe))
        losses, samples, draws, progress = run_steps(bench, progress, steps, checkpoints)
        checkpoints.finish()
        moments = {kind: bench.moments(kind) for kind in MOMENTS[recipe.optimizer.type]}
        return End(losses, samples, draws, progress, bench.weights(), moments, rng_states())


def run_steps(
    bench: Bench, progress: Progress, steps: int, checkpoints: Checkpoints
) -> tuple[list[float], list[tuple[int, ...]], list[float], Progress]:
    """Losses; ids of this rank's samples by micro batch; what Python and NumPy drew meanwhile."""
    recipe, at = bench.recipe, bench.groups.coordinates
    samples = MockSamples(recipe.model.seq_length, recipe.tokenizer.vocab_size, 8 * 2 * N, (recipe.run.seed,))
    reading = Reading(recipe.train.micro_batch_size, at.data, bench.groups.layout.data)
    data = Batches(samples, lambda _: recipe.train.global_batch_size, reading, progress.samples)
    schedule = LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters)
    losses, ids, draws = [], [], []
    for _ in range(steps):
        batches = data.next()
        result = bench.engine.train_step(batches, schedule.at(progress.next_optimizer_step))
        progress = progress.after(result, data.consumed_samples)
        losses.append(result.loss)
        ids += [batch.sample_ids for batch in batches]
        draws += [random.gauss(), float(np.random.standard_normal())]
        checkpoints.poll()
        checkpoints.save(TrainingState(progress))
    return losses, ids, draws, progress


BEHIND = ["DP2, ZeRO 1", "DP2, ZeRO 3", "PP2", "TP2", "bf16, PP2 tied"]
SLOW = {
    ("one process, SGD", False),
    ("DP2, ZeRO 1, SGD", False),
    ("DP2, ZeRO 3, SGD", False),
    ("ZeRO 1, tied with biases", False),
    ("bf16", False),
    ("bf16, DP2, ZeRO 1", False),
    ("TP2", True),
    ("bf16, PP2 tied", True),
}
RUNS = [*((case, False) for case in CASES), *((case, True) for case in BEHIND)]


@pytest.mark.parametrize(
    ("case", "async_save"),
    [
        pytest.param(*run, id=f"{run[0]}{', asynchronous' if run[1] else ''}", marks=[pytest.mark.slow] if run in SLOW else [])
        for run in RUNS
    ],
)
def test_goes_on_as_if_never_stopped(ranks: Ranks, tmp_path: Path, case: str, async_save: bool) -> None:
    world_size, recipe = recipe_of(case)
    recipe = recipe.model_copy(update={"checkpoint": CheckpointConfig(async_save=async_save)})
    whole: list[End] = ranks(world_size).run(train, recipe, 2 * N, tmp_path / "whole", False)
    halves: list[list[End]] = [ranks(world_size).run(train, recipe, N, tmp_path / "halves", resume) for resume in (False, True)]
    for rank, expected in enumerate(whole):
        first, second = (half[rank] for half in halves)
        assert first.losses + second.losses == expected.losses
        assert first.samples + second.samples == expected.samples
        assert first.draws + second.draws == expected.draws
        assert second.progress == expected.progress
        assert_same(second.random, expected.random, 0)
    assert len(set(whole[0].losses)) == 2 * N
    first, second, expected = halves[0][0], halves[1][0], whole[0]
    assert_same(second.weights, expected.weights, 0)
    for kind, moments in expected.moments.items():
        assert_same(second.moments[kind], moments, 0)


@pytest.mark.parametrize(
    "before", [pytest.param("one process, SGD", marks=pytest.mark.slow), "DP2, ZeRO 1, SGD", "one process", "DP2, ZeRO 1"]
)
def test_moments_of_another_optimizer_begin_anew(ranks: Ranks, tmp_path: Path, before: str) -> None:
    """Weights and progress are the earlier run's."""
    world_size, recipe = recipe_of(before)
    other = recipe.optimizer.model_copy(update={"type": "adamw" if recipe.optimizer.type == "sgd" else "sgd"})
    ranks(world_size).run(train, recipe, N, tmp_path, False)
    ended = ranks(world_size).run(train, recipe.model_copy(update={"optimizer": other}), N, tmp_path, True)
    assert ended[0].progress.step == 2 * N and all(math.isfinite(loss) for loss in ended[0].losses)
    state = read_state(find(tmp_path).checkpoint)["optimizer"]
    assert set(state["kinds"]) == set(MOMENTS[other.type])
    assert state["steps"] == (N if other.type == "adamw" else 0)
