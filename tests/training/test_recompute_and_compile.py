"""Switches that trade time for memory, or one kernel for another, and must not change what is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest

from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2, LLAMA
from tests.training.engines import PP2, TP2, TP2_SP, Bench, Tensors, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
LR = 0.1
MICRO_BATCHES, LAYERS = 2, 4


@dataclass(frozen=True)
class Run:
    """Two steps: their losses and the weights after them (rank 0 has them); how often each kind of module ran in the first."""

    losses: list[float]
    weights: Tensors
    calls: Counter[str]


def two_steps(ranks: RankContext, recipe: Recipe) -> Run:
    with bench_of(ranks, recipe) as bench:
        calls = counted_calls(bench)
        losses = [bench.engine.train_step(bench.share(global_batch(recipe)), LR).loss]
        first = Counter(calls)
        losses.append(bench.engine.train_step(bench.share(global_batch(recipe)), LR).loss)
        return Run(losses, bench.weights(), first)


def counted_calls(bench: Bench) -> Counter[str]:
    """Counts the forward passes of attention and feed-forward parts from now on, per layer and micro batch."""
    calls: Counter[str] = Counter()

    def count(kind: str) -> Callable[..., None]:
        return lambda *_: calls.update([kind])

    for chunk in bench.engine.chunks:
        for layer in chunk.decoder.layers:
            layer.self_attention.core_attention.register_forward_hook(count("core_attn"))
            layer.mlp.register_forward_hook(count("mlp"))
    return calls


def recipe_with(model: dict[str, Any], parallel: dict[str, Any], **train: Any) -> Recipe:
    return sgd_recipe(
        model={**model, "num_layers": LAYERS, "init_method_std": 0.1},
        parallel=parallel,
        train={"micro_batch_size": 2, "global_batch_size": 2 * MICRO_BATCHES, **train},
    )


FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
# Keys of `train`; then how often a layer's attention and feed-forward part run in each micro batch.
RECOMPUTATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "full, each layer": ({**FULL, "recompute_method": "uniform", "recompute_num_layers": 1}, 2, 2),
    "full, two layers at once": ({**FULL, "recompute_method": "uniform", "recompute_num_layers": 2}, 2, 2),
    "full, all layers as blocks": ({**FULL, "recompute_method": "block", "recompute_num_layers": LAYERS}, 2, 2),
    "attention": ({**SELECTIVE, "recompute_modules": ("core_attn",)}, 2, 1),
    "attention and feed-forward": ({**SELECTIVE, "recompute_modules": ("core_attn", "mlp")}, 2, 2),
}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, LLAMA),
    "TP2 SP": (2, TP2_SP, LLAMA),
    "TP2 SP, with biases": (2, TP2_SP, GPT2),
    "PP2": (2, PP2, LLAMA),
}
# Megatron-core 0.16 cannot recompute a feed-forward part that has biases: its backward calls itself without end.
CASES = [case for case in product(RECOMPUTATIONS, LAYOUTS) if case != ("attention and feed-forward", "TP2 SP, with biases")]


@pytest.fixture(scope="module")
def stored(ranks: Ranks) -> Callable[[str], list[Run]]:
    """The run of a layout without recomputation, made once."""
    made: dict[str, list[Run]] = {}

    def run(layout: str) -> list[Run]:
        if layout not in made:
            world_size, parallel, model = LAYOUTS[layout]
            made[layout] = ranks(world_size).run(two_steps, recipe_with({**model, **DROPOUT}, parallel))
        return made[layout]

    return run


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_recomputing_gives_the_same_digits(ranks: Ranks, stored: Callable[[str], list[Run]], name: str, layout: str) -> None:
    """With dropout, whose masks must come again; and it does recompute."""
    world_size, parallel, model = LAYOUTS[layout]
    train, attention, feed_forward = RECOMPUTATIONS[name]
    runs: list[Run] = ranks(world_size).run(two_steps, recipe_with({**model, **DROPOUT}, parallel, **train))
    for run, expected in zip(runs, stored(layout), strict=True):
        assert run.losses == expected.losses
        assert expected.calls["core_attn"] == expected.calls["mlp"] > 0
        assert run.calls == {kind: times * expected.calls[kind] for kind, times in (("core_attn", attention), ("mlp", feed_forward))}
    assert_same(runs[0].weights, stored(layout)[0].weights, 0)


def test_only_some_layers_as_blocks(ranks: Ranks) -> None:
    recipe = recipe_with(LLAMA, {}, **FULL, recompute_method="block", recompute_num_layers=1)
    run: Run = ranks(1).run(two_steps, recipe)[0]
    assert run.calls["core_attn"] == MICRO_BATCHES * (LAYERS + 1)


@pytest.mark.parametrize(("world_size", "parallel", "model"), [(1, {}, LLAMA), (1, {}, GPT2), (2, TP2, LLAMA), (2, TP2_SP, GPT2)])
def test_attention_backends_agree(ranks: Ranks, world_size: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    runs = {}
    for backend in ("sdpa", "local"):
        recipe = recipe_with({**model, "attention_backend": backend}, parallel)
        runs[backend] = ranks(world_size).run(two_steps, recipe)[0]
    assert runs["sdpa"].losses == pytest.approx(runs["local"].losses, rel=1e-6)
    assert_same(runs["sdpa"].weights, runs["local"].weights, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "parallel", "model"), [(1, {}, LLAMA), (2, TP2_SP, GPT2)])
def test_compiled_layers_agree(ranks: Ranks, world_size: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    runs = {}
    for compiled in (False, True):
        runs[compiled] = ranks(world_size).run(two_steps, recipe_with(model, parallel, compile=compiled), timeout=600.0)[0]
    assert runs[True].losses == pytest.approx(runs[False].losses, abs=1e-5)
    assert_same(runs[True].weights, runs[False].weights, 1e-5)
