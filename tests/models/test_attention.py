"""The attention layer against the formula: softmax(Q K^T / sqrt(d)) V with the mask that its type says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from largeformer.models.attention import ScaledDotProductAttention
from largeformer.parallel.device import prepare_device, seed_ranks

HEADS, SIZE, BATCH = 4, 8, 2


def attention(mask_type: AttnMaskType = AttnMaskType.causal, dropout: float = 0.0, **arguments: Any) -> ScaledDotProductAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS, attention_dropout=dropout)
    return ScaledDotProductAttention(config, layer_number=1, attn_mask_type=mask_type, attention_type="self", **arguments)


def inputs(queries: int, keys: int, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((queries, BATCH, HEADS, SIZE), (keys, BATCH, groups, SIZE), (keys, BATCH, groups, SIZE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def formula(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masked: torch.Tensor, scale: float) -> torch.Tensor:
    """Written out, one head at a time; query group i serves the heads from i * n / g on."""
    heads = []
    for head in range(HEADS):
        group = head * key.shape[2] // HEADS
        scores = torch.einsum("qbd,kbd->bqk", query[:, :, head].double(), key[:, :, group].double()) * scale
        weights = scores.masked_fill(masked, float("-inf")).softmax(dim=-1)
        heads.append(torch.einsum("bqk,kbd->qbd", weights, value[:, :, group].double()))
    return torch.cat(heads, dim=-1).float()


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)


PADDING = torch.zeros(BATCH, 1, 6, 6, dtype=torch.bool)
PADDING[1, :, :, 4:] = True

# name: number of queries, of keys, query groups, type of the module, type of the call, mask of the call, what is masked
CASES: dict[str, tuple[int, int, int, AttnMaskType, AttnMaskType | None, torch.Tensor | None, torch.Tensor]] = {
    "causal": (6, 6, 4, AttnMaskType.causal, None, None, causal(6, 6)),
    "causal, grouped": (6, 6, 2, AttnMaskType.causal, None, None, causal(6, 6)),
    "causal, one group": (6, 6, 1, AttnMaskType.causal, None, None, causal(6, 6)),
    "first token": (1, 1, 2, AttnMaskType.causal, None, None, causal(1, 1)),
    "decode: one query sees the whole cache": (1, 6, 2, AttnMaskType.causal, AttnMaskType.no_mask, None, causal(1, 6)),
    "one query alone sees the whole cache, whatever its type": (1, 6, 2, AttnMaskType.causal, None, None, causal(1, 6)),
    "cross: all see all": (3, 6, 4, AttnMaskType.no_mask, None, None, torch.zeros(3, 6, dtype=torch.bool)),
    "padding mask, True is masked": (6, 6, 4, AttnMaskType.padding, None, PADDING, PADDING[:, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_formula(name: str) -> None:
    queries, keys, groups, own_type, call_type, mask, masked = CASES[name]
    query, key, value = inputs(queries, keys, groups)
    ours = attention(own_type)(query, key, value, mask, attn_mask_type=call_type)
    assert ours.shape == (queries, BATCH, HEADS * SIZE)
    torch.testing.assert_close(ours, formula(query, key, value, masked, 1 / math.sqrt(SIZE)), rtol=0, atol=2e-6)


def test_the_scale_can_be_given() -> None:
    query, key, value = inputs(6, 6, 4)
    ours = attention(softmax_scale=0.5)(query, key, value, None)
    torch.testing.assert_close(ours, formula(query, key, value, causal(6, 6), 0.5), rtol=0, atol=2e-6)


def test_dropout_draws_from_the_ranks_own_state_and_only_in_training() -> None:
    prepare_device(0)
    query, key, value = inputs(6, 6, 4)
    layer = attention(dropout=0.5)

    def trained(tensor_rank: int) -> torch.Tensor:
        seed_ranks(1, tensor_rank, 0, 0)
        return layer(query, key, value, None)

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))
    outside = torch.get_rng_state()
    layer(query, key, value, None)
    assert torch.equal(torch.get_rng_state(), outside), "dropout inside a tensor-parallel region must leave the shared state alone"
    layer.eval()
    torch.testing.assert_close(layer(query, key, value, None), formula(query, key, value, causal(6, 6), SIZE**-0.5), rtol=0, atol=2e-6)
