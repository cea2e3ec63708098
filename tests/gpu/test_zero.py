"""Every ZeRO stage and offload to the CPU, on the GPU with its own kernels, beside ZeRO 1. One rank: what is compared is the
bookkeeping of partitions, casts and copies between devices; that many ranks agree is shown without a GPU."""

from __future__ import annotations

import pytest
import torch

from largeformer.training.engine import StepResult
from tests.gpu.runs import assert_alike, engine_on, recipe_of, step, trained
from tests.training.engines import Bench

pytestmark = pytest.mark.gpu

# DeepSpeed config: its stage, and where the moments stand
CONFIGS: dict[str, tuple[int, str | None]] = {
    "zero1": (1, None),
    "zero2": (2, None),
    "zero3": (3, None),
    "zero2_offload_cpu": (2, "cpu"),
    "zero3_offload_cpu": (3, "cpu"),
}


@pytest.fixture(scope="module")
def reference(device: torch.device) -> dict[str, list[StepResult]]:
    """The steps of ZeRO 1, by precision."""
    return {precision: trained(device, recipe_of(precision, "zero1", initial_loss_scale_power=10)) for precision in ("bf16", "fp16")}


def devices_of_moments(bench: Bench) -> set[str]:
    states = bench.engine.wrapped.optimizer.optimizer.state.values()
    return {state["exp_avg"].device.type for state in states if "exp_avg" in state}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_equals_zero_1(device: torch.device, reference: dict[str, list[StepResult]], config: str, precision: str) -> None:
    stage, offloaded = CONFIGS[config]
    recipe = recipe_of(precision, config, initial_loss_scale_power=10)
    with engine_on(device, recipe) as bench:
        assert bench.engine.wrapped.zero_optimization_stage() == stage
        results = [step(bench, device, seed) for seed in range(len(reference[precision]))]
        assert devices_of_moments(bench) == {offloaded or device.type}
    assert_alike(results, reference[precision], 1e-2)
