"""Predicted model state against the bytes that real engines hold, on gloo ranks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.planning.inventory import inventories
from largeformer.planning.states import State, state_of
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2, LLAMA
from tests.training.engines import Bench, bench_of, fp16_on_cpu, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VIRTUAL = {**PP2, "virtual_pipeline_model_parallel_size": 2}
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}
TIED = {**LLAMA, "tie_embeddings": True}

# world size, model, parallel section, precision, ZeRO
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], str, int]] = {
    **{f"fp32, DP2, ZeRO {stage}": (2, LLAMA, {}, "fp32", stage) for stage in range(4)},
    **{f"bf16, DP2, ZeRO {stage}": (2, LLAMA, {}, "bf16", stage) for stage in (1, 2, 3)},
    **{f"fp16, DP2, ZeRO {stage}": (2, LLAMA, {}, "fp16", stage) for stage in (2, 3)},
    **{f"bf16, TP2, ZeRO {stage}": (2, LLAMA, TP2, "bf16", stage) for stage in (1, 2, 3)},
    "fp32, TP2 with biases, ZeRO 0": (2, GPT2, TP2, "fp32", 0),
    "bf16, GPT-2, DP2, ZeRO 3": (2, GPT2, {}, "bf16", 3),
    "bf16, PP2, ZeRO 1": (2, LLAMA, PP2, "bf16", 1),
    "fp32, PP2, ZeRO 0": (2, LLAMA, PP2, "fp32", 0),
    "bf16, PP2 tied, ZeRO 1": (2, TIED, PP2, "bf16", 1),
    "bf16, PP2 uneven, ZeRO 1": (2, LLAMA, UNEVEN, "bf16", 1),
    "bf16, PP2 virtual, ZeRO 1": (2, LLAMA, VIRTUAL, "bf16", 1),
    "bf16, TP2 x PP2 tied, ZeRO 1": (4, TIED, {**TP2, **PP2}, "bf16", 1),
    **{f"bf16, TP2 x DP2, ZeRO {stage}": (4, LLAMA, TP2, "bf16", stage) for stage in (1, 2, 3)},
    "bf16, PP2 x DP2 uneven, ZeRO 1": (4, GPT2, UNEVEN, "bf16", 1),
    **{f"bf16, DP3, ZeRO {stage}": (3, LLAMA, {}, "bf16", stage) for stage in (1, 2, 3)},
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if CASES[c][0] > 2 else []) for c in CASES])
def test_state_is_what_the_engine_holds(ranks: Ranks, tmp_path: Path, case: str) -> None:
    world_size, model, parallel, precision, zero = CASES[case]
    recipe = recipe_of(tmp_path, {**model, "num_layers": 4}, parallel, precision, zero=zero, data=world_size)
    held: list[State] = ranks(world_size).run(hold, recipe)
    layout = recipe.layout(world_size)
    deepspeed = resolve_deepspeed(recipe, load_deepspeed(recipe), world_size)
    for rank, found in enumerate(held):
        stage = inventories(recipe)[layout.coordinates(rank).pipeline]
        expected = state_of(recipe, stage, deepspeed, layout.data).device
        assert (found.weights, found.gradients, found.masters, found.moments) == (
            expected.weights,
            expected.gradients,
            expected.masters,
            expected.moments,
        )


@pytest.mark.parametrize(("zero", "parts"), [(2, ("masters", "moments", "gradients")), (3, ("masters", "moments", "gradients"))])
def test_what_is_offloaded_lies_on_the_host(tmp_path: Path, zero: int, parts: tuple[str, ...]) -> None:
    """The bytes of the state stay what they are; they move."""
    plain = recipe_of(tmp_path, LLAMA, {}, "bf16", zero=zero, data=2)
    offloaded = {"zero_optimization": {"stage": zero, "offload_optimizer": {"device": "cpu"}}}
    (stage,) = inventories(plain)
    here = state_of(plain, stage, {"zero_optimization": {"stage": zero}}, 2).device
    there = state_of(plain, stage, offloaded, 2)
    assert [getattr(there.device, part) for part in parts] == [0, 0, 0]
    copies = here.masters // 2 if zero == 2 else 0
    assert there.host == sum(getattr(here, part) for part in parts) + copies
    assert there.device.weights == here.weights


def recipe_of(folder: Path, model: dict[str, Any], parallel: dict[str, Any], precision: str, *, zero: int, data: int) -> Recipe:
    config = folder / "zero.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": zero, "reduce_bucket_size": 256, "allgather_bucket_size": 256}}))
    return sgd_recipe(
        model=model,
        parallel=parallel,
        train={"precision": precision, "global_batch_size": 4 if data != 3 else 3},
        optimizer={"type": "adamw"},
        deepspeed=str(config),
    )


def hold(ranks: RankContext, recipe: Recipe) -> State:
    """Bytes on this rank after a step and a second backward."""
    batch = global_batch(recipe)
    supported = fp16_on_cpu() if recipe.train.precision == "fp16" else contextlib.nullcontext()
    with supported, bench_of(ranks, recipe) as bench:
        bench.engine.train_step(bench.share(batch), 1e-3)
        bench.engine.accumulate(bench.share(batch))
        base = getattr(bench.engine.wrapped.optimizer, "optimizer", bench.engine.wrapped.optimizer)
        masters = size(base.state) if bench.engine.wrapped.zero_optimization_stage() > 0 else 0
        moments = size(value for state in base.state.values() for kind, value in state.items() if kind.startswith("exp_avg"))
        return State(size(weights_of(bench)), size(gradients_of(bench)), masters, moments)


def weights_of(bench: Bench) -> Iterable[torch.Tensor]:
    for chunk in bench.engine.chunks:
        for parameter in chunk.parameters():
            if hasattr(parameter, "ds_tensor"):
                yield parameter.ds_tensor
                if parameter.ds_status.name == "AVAILABLE":
                    yield parameter.data
            else:
                yield parameter.data


def gradients_of(bench: Bench) -> Iterable[torch.Tensor]:
    """Where each of DeepSpeed's optimizers keeps what it will step by."""
    optimizer = bench.engine.wrapped.optimizer
    if hasattr(optimizer, "fp32_groups_gradients_flat"):
        return optimizer.fp32_groups_gradients_flat  # type: ignore[no-any-return]
    if hasattr(optimizer, "grad_partitions_flat_buffer"):
        return [optimizer.grad_partitions_flat_buffer]
    if hasattr(optimizer, "averaged_gradients"):
        # Parts of larger buffers: their own elements count.
        return [part.clone() for group in optimizer.averaged_gradients.values() for part in group]
    return [parameter.grad for chunk in bench.engine.chunks for parameter in chunk.parameters()]


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of their storages; tensors that share one count once."""
    kept = list(tensors)  # alive, so that no address is used twice
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.numel()}.values())
