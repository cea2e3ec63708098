"""Bytes of model state on a rank against the table of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 5).

Nothing is estimated: every tensor that came alive since before the engine was built is counted, after a backward and before its
step. What is neither a parameter nor the optimizer's counts as gradient, so that a forgotten buffer of the model's size shows.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2, Batch, Bench, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]


@dataclass(frozen=True)
class Bytes:
    """On one rank, for each parameter of the model's shard that the rank's model-parallel place holds."""

    parameters: float
    gradients: float
    optimizer: float


@dataclass(frozen=True)
class Measured:
    per_parameter: Bytes
    held: int
    """Parameters of this model-parallel rank's shard, whole over data parallel."""


def formula(precision: str, zero: int, data: int) -> Bytes:
    """Weights in the model's dtype, gradients in float32, master and two moments in float32; each parted from its stage on.

    Two departures from the table, both DeepSpeed's: without ZeRO the float32 weights are their own masters; and ZeRO 1 in fp32
    lets go of other ranks' gradients as soon as they are reduced.
    """
    weights = 4 if precision == "fp32" else 2
    masters = 4 if zero > 0 else 0
    gradients_since = 1 if precision == "fp32" else 2
    return Bytes(
        parameters=weights / (data if zero >= 3 else 1),
        gradients=4 / (data if zero >= gradients_since else 1),
        optimizer=(masters + 8) / (data if zero >= 1 else 1),
    )


def measure(ranks: RankContext, recipe: Recipe) -> Measured:
    batch = global_batch(recipe)
    gc.collect()
    before = set(storages(alive()))
    with bench_of(ranks, recipe) as bench:
        looks = [look(bench, batch, before) for _ in range(3)]
        held = sum(getattr(p, "ds_numel", p.numel()) for chunk in bench.engine.chunks for p in chunk.parameters())
        # What Python's collector has not come to yet is there, but not held: the least of several looks is without it.
        return Measured(Bytes(*(min(sizes) / held for sizes in zip(*looks, strict=True))), held)


def look(bench: Bench, batch: Batch, before: set[int]) -> tuple[int, int, int]:
    """Bytes of parameters, of what is neither (gradients, mostly), and of the optimizer, between the backward of a step and its update."""
    bench.engine.train_step(bench.share(batch), 1e-3)
    bench.engine.accumulate(bench.share(batch))
    every = {pointer: size for pointer, size in storages(alive()).items() if pointer not in before}
    parameters, optimizer = set(storages(held_by_model(bench))), set(storages(held_by_optimizer(bench)))
    of_model = sum(size for pointer, size in every.items() if pointer in parameters)
    of_optimizer = sum(size for pointer, size in every.items() if pointer in optimizer - parameters)
    return of_model, sum(every.values()) - of_model - of_optimizer, of_optimizer


def alive() -> Iterable[torch.Tensor]:
    """Every tensor that Python knows, with its gradient."""
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            yield thing
            if thing.is_leaf and thing.grad is not None:
                yield thing.grad


def held_by_model(bench: Bench) -> Iterable[torch.Tensor]:
    for chunk in bench.engine.chunks:
        for parameter in chunk.parameters():
            yield parameter.data
            if hasattr(parameter, "ds_tensor"):
                yield parameter.ds_tensor


def held_by_optimizer(bench: Bench) -> Iterable[torch.Tensor]:
    wrapped = bench.engine.wrapped.optimizer
    for group in wrapped.param_groups:
        yield from group["params"]
    for master, state in getattr(wrapped, "optimizer", wrapped).state.items():
        yield master
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address -> bytes; tensors that share memory count once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}


# world size, parallel section, precision, ZeRO
CASES: dict[str, tuple[int, dict[str, Any], str, int]] = {
    "fp32, one process, ZeRO 0": (1, {}, "fp32", 0),
    **{f"fp32, DP2, ZeRO {stage}": (2, {}, "fp32", stage) for stage in range(4)},
    **{f"bf16, DP2, ZeRO {stage}": (2, {}, "bf16", stage) for stage in (1, 2, 3)},
    "fp32, TP2, ZeRO 0": (2, TP2, "fp32", 0),
    **{f"bf16, TP2, ZeRO {stage}": (2, TP2, "bf16", stage) for stage in (1, 2, 3)},
    "bf16, PP2, ZeRO 1": (2, PP2, "bf16", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_model_state_is_what_the_formula_says(ranks: Ranks, tmp_path: Path, case: str) -> None:
    world_size, parallel, precision, zero = CASES[case]
    # Buckets of DeepSpeed's are as large as a small model: here they are a thousandth of it.
    config = tmp_path / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero, "reduce_bucket_size": 256, "allgather_bucket_size": 256}}))
    recipe = sgd_recipe(
        model={"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 256},
        tokenizer={"vocab_size": 256},
        parallel=parallel,
        train={"precision": precision, "global_batch_size": 4},
        optimizer={"type": "adamw"},
        deepspeed=str(config),
    )
    expected = formula(precision, zero, recipe.layout(world_size).data)
    measured: list[Measured] = ranks(world_size).run(measure, recipe)
    for rank in measured:
        found = rank.per_parameter
        assert found.parameters == pytest.approx(expected.parameters, abs=0.03)  # norms stay whole under ZeRO 3
        assert found.optimizer == pytest.approx(expected.optimizer, abs=0.03)  # partitions are padded
        assert found.gradients == pytest.approx(expected.gradients, abs=0.2)  # with tables of positions, random states, buckets
    assert [rank.held for rank in measured] == shares(recipe, world_size)


def shares(recipe: Recipe, world_size: int) -> list[int]:
    """Parameters of each rank, by hand: an untied Llama with grouped queries."""
    h, f, v, layers = 128, 256, 256, 2
    attention = h * (h + 2 * (h // 2)) + h * h
    layer, norms = attention + 3 * h * f, 2 * h
    tensor = recipe.parallel.tensor_model_parallel_size
    if recipe.parallel.pipeline_model_parallel_size == 2:
        return [v * h + layer + norms, layer + norms + h + v * h]
    return [(2 * v * h + layers * layer) // tensor + layers * norms + h] * world_size
