"""Packed documents give the same digits at every layout, recomputed, compiled, and with either attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.data.packing import restarting_positions, segment_ids
from largeformer.parallel.batch import Batch
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2, LLAMA
from tests.training.engines import PP2, TP2_SP, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
EOD_SHARE = 0.2


def packed(recipe: Recipe) -> Batch:
    batch = global_batch(recipe)
    ends = (torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(1)) < EOD_SHARE).numpy()
    segments = segment_ids(ends, True)
    assert segments.max() > 1
    return replace(batch, segment_ids=torch.from_numpy(segments), position_ids=torch.from_numpy(restarting_positions(segments)))


def step(ranks: RankContext, recipe: Recipe, reset: bool) -> tuple[float, Any]:
    with bench_of(ranks, recipe) as bench:
        batch = packed(recipe) if reset else global_batch(recipe)
        loss = bench.engine.train_step(bench.share(batch), 0.1).loss
        return loss, bench.weights()


def recipe_of(model: dict[str, Any], parallel: dict[str, Any], **train: Any) -> Recipe:
    return sgd_recipe(
        model={**model, "num_layers": 4, "init_method_std": 0.1},
        parallel=parallel,
        train={"micro_batch_size": 2, "global_batch_size": 8, **train},
    )


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> Callable[[dict[str, Any]], tuple[float, Any]]:
    made: dict[int, tuple[float, Any]] = {}

    def run(model: dict[str, Any]) -> tuple[float, Any]:
        if id(model) not in made:
            made[id(model)] = ranks(1).run(step, recipe_of(model, {}), True)[0]
        return made[id(model)]

    return run


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CORE = {"recompute_granularity": "selective", "recompute_modules": ("core_attn",)}
INTERLEAVED = {**PP2, "virtual_pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("size", "model", "parallel", "train"),
    [
        pytest.param(1, LLAMA, {}, FULL, id="recomputed"),
        pytest.param(1, LLAMA, {}, CORE, id="attention recomputed"),
        pytest.param(1, {**LLAMA, "attention_backend": "local"}, {}, {}, id="local attention"),
        pytest.param(2, LLAMA, {}, {}, id="DP2"),
        pytest.param(2, GPT2, TP2_SP, {}, id="TP2 SP"),
        pytest.param(2, GPT2, TP2_SP, FULL, id="TP2 SP, recomputed"),
        pytest.param(2, LLAMA, PP2, {}, id="PP2"),
        pytest.param(2, GPT2, INTERLEAVED, {}, id="PP2, interleaved"),
        pytest.param(1, LLAMA, {}, {"compile": True}, id="compiled", marks=pytest.mark.slow),
    ],
)
def test_equals_one_process(
    ranks: Ranks, reference: Callable[..., Any], size: int, model: dict[str, Any], parallel: dict[str, Any], train: dict[str, Any]
) -> None:
    loss, weights = ranks(size).run(step, recipe_of(model, parallel, **train), True, timeout=600.0)[0]
    expected_loss, expected = reference(GPT2 if "add_bias_linear" in model else LLAMA)
    assert loss == pytest.approx(expected_loss, rel=1e-6 if not train.get("compile") else 1e-5)
    assert_same(weights, expected, 2e-6 if not train.get("compile") else 1e-5)


def test_it_is_another_step_than_without(ranks: Ranks, reference: Callable[..., Any]) -> None:
    loss, _ = ranks(1).run(step, recipe_of(LLAMA, {}), False)[0]
    assert abs(loss - reference(LLAMA)[0]) > 1e-4
