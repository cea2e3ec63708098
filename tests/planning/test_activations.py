"""Predicted activations against the tensors that autograd saves in a real forward, on a CPU.

Storages are counted, once each, as long as parameters do not own them. What the head keeps beside autograd (`models/losses.py`) is
counted from its context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.models.gpt import DTYPES, build_gpt
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import create_groups, destroy_groups
from largeformer.parallel.pipeline import forward_loss
from largeformer.planning.activations import chunk_bytes, embedding_bytes, layer_bytes
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2, LLAMA, tiny_recipe
from tests.training.engines import global_batch

Ranks = Callable[[int], RankPool]

WIDE = {"seq_length": 128, "ffn_hidden_size": 160}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TP2 = {"tensor_model_parallel_size": 2}

# world size, model, parallel section, train section
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama, grouped queries, bf16": (1, LLAMA, {}, {"precision": "bf16"}),
    "llama, fp32": (1, LLAMA, {}, {}),
    "llama, dense attention": (1, {**LLAMA, "num_query_groups": None}, {}, {"precision": "bf16"}),
    "llama, local attention": (1, {**LLAMA, "attention_backend": "local", "num_query_groups": None}, {}, {"precision": "bf16"}),
    "gpt2, GELU and biases, bf16": (1, GPT2, {}, {"precision": "bf16"}),
    "gpt2, fp32": (1, GPT2, {}, {}),
    "gpt2, dropout": (1, {**GPT2, "hidden_dropout": 0.1, "attention_dropout": 0.1}, {}, {"precision": "bf16"}),
    "gpt2, local attention": (1, {**GPT2, "attention_backend": "local"}, {}, {"precision": "bf16"}),
    "full recomputation": (1, LLAMA, {}, {"precision": "bf16", **FULL}),
    "full, two layers at once": (1, LLAMA, {}, {"precision": "bf16", **FULL, "recompute_num_layers": 2}),
    "full, block": (1, LLAMA, {}, {"precision": "bf16", **FULL, "recompute_method": "block"}),
    "selective, attention": (1, LLAMA, {}, {"precision": "bf16", "recompute_granularity": "selective"}),
    "selective, feed-forward": (1, LLAMA, {}, {"precision": "bf16", "recompute_granularity": "selective", "recompute_modules": ("mlp",)}),
    "TP2": (2, LLAMA, TP2, {"precision": "bf16"}),
    "TP2, sequence parallel": (2, LLAMA, {**TP2, "sequence_parallel": True}, {"precision": "bf16"}),
    "gpt2, TP2, sequence parallel": (2, GPT2, {**TP2, "sequence_parallel": True}, {"precision": "bf16"}),
    "TP2, sequence parallel, full": (2, LLAMA, {**TP2, "sequence_parallel": True}, {"precision": "bf16", **FULL}),
}


@pytest.mark.parametrize("case", CASES)
def test_activations_are_what_autograd_saves(ranks: Ranks, case: str) -> None:
    world_size, model, parallel, train = CASES[case]
    recipe = tiny_recipe(model={**WIDE, **model}, parallel=parallel, train={"micro_batch_size": 2, "global_batch_size": 2, **train})
    expected = chunk_bytes(recipe, recipe.model.num_layers, fused=False) + embedding_bytes(recipe, fused=False) + final_norm(recipe)
    for saved in ranks(world_size).run(saved_bytes, recipe):
        assert saved == pytest.approx(expected, rel=0.10)


def test_a_gpu_keeps_less_of_a_norm() -> None:
    """PyTorch's RMSNorm is one kernel there, which keeps its input and one number a token; the rest of a layer is the same."""
    recipe = tiny_recipe(model=LLAMA, train={"precision": "bf16"})
    tokens, hidden = recipe.train.micro_batch_size * recipe.model.seq_length, recipe.model.hidden_size
    assert layer_bytes(recipe, fused=False).kept - layer_bytes(recipe).kept == 2 * tokens * hidden * (8 - 2)


def final_norm(recipe: Recipe) -> int:
    """As `_norm`: what the last norm saves; its output the head keeps itself."""
    tokens = recipe.train.micro_batch_size * recipe.model.seq_length
    tokens //= recipe.parallel.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1
    if recipe.model.normalization == "RMSNorm":
        return tokens * (8 * recipe.model.hidden_size + 4)
    return tokens * (recipe.model.hidden_size * DTYPES[recipe.train.precision].itemsize + 8)


def saved_bytes(ranks: RankContext, recipe: Recipe) -> int:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    at = groups.coordinates
    seed_ranks(recipe.run.seed, at.tensor, at.data, at.pipeline)
    kept: list[torch.Tensor] = []
    try:
        (model,), _ = build_gpt(recipe, groups, device)
        model.to(DTYPES[recipe.train.precision]).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            forward_loss(model, global_batch(recipe))
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    finally:
        destroy_groups()
    return sum(count for pointer, count in storages.items() if pointer not in parameters)
