"""Planned memory of a step against what PyTorch's allocator held at the most, on the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.planning.hardware import cluster_of
from largeformer.planning.memory import rank_memory
from largeformer.planning.prediction import job_of
from tests.gpu.runs import engine_on, recipe_of, step

pytestmark = pytest.mark.gpu

# 90 million parameters, and activations of their order and above: small tensors and rounding decide nothing.
SHAPE: dict[str, Any] = {"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16, "seq_length": 1024}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
GELU = {
    "normalization": "LayerNorm",
    "activation": "gelu",
    "position_embedding": "learned",
    "add_bias_linear": True,
    "num_query_groups": None,
}


@pytest.mark.parametrize(
    ("deepspeed", "model", "train"),
    [
        pytest.param("zero1", {}, {}, id="zero1"),
        pytest.param("zero1", {}, FULL, id="zero1, recomputed"),
        pytest.param("zero2", {}, {}, id="zero2"),
        pytest.param("zero3", {}, {}, id="zero3"),
        pytest.param("zero1", GELU, {}, id="zero1, GELU"),
    ],
)
def test_peak_is_within_a_tenth(device: torch.device, deepspeed: str, model: dict[str, Any], train: dict[str, Any]) -> None:
    if device.type != "cuda":
        pytest.skip("PyTorch counts allocations on GPUs only")
    recipe = recipe_of("bf16", deepspeed, model={**SHAPE, **model}, micro_batch_size=8, global_batch_size=16, **train)
    cluster = cluster_of(recipe.plan)
    expected = rank_memory(job_of(recipe, 1, resolve_deepspeed(recipe, load_deepspeed(recipe), 1), replace(cluster, gpus_per_node=1)))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    with engine_on(device, recipe) as bench:
        step(bench, device, seed=0)
        torch.cuda.reset_peak_memory_stats(device)
        step(bench, device, seed=1)
        peak = torch.cuda.max_memory_allocated(device) - before
    assert max(row.allocated_bytes for row in expected) == pytest.approx(peak, rel=0.10)
