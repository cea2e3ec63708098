"""SmoothQuant (Xiao et al. 2022, arXiv:2211.10438): activations that integers hold more easily, and a model that computes the same.

Input channel j of a linear layer is divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and column j of its matrix multiplied by it.
The division is folded into what makes the input: the norm before; or, for what follows the values or a gated `up`, their rows.
`o` output, `i` input channels, `h` hidden, `d` head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from largeformer.compression.linears import Linear
from largeformer.config.schema import ModelConfig

_LEAST = 1e-5


@torch.no_grad()
def smooth(
    model: Any,
    linears: Sequence[Sequence[Linear]],
    ranges: Mapping[Linear, torch.Tensor],
    shape: ModelConfig,
    alpha: float,
    projections: bool,
) -> None:
    """Fold the factors in, layer by layer. ranges: the largest magnitude of each input channel, [i], of the model as it is.

    `linears`: each layer's, in the order of computing. projections: smooth what follows values and `up` as well; a feed-forward layer
    without gate has a curve between its matrices, through which nothing can be folded. Collective over tensor parallelism.
    """
    for layer, (qkv, out, first, second) in zip(model.decoder.layers, linears, strict=True):
        if projections:
            _behind_values(qkv, out, ranges[out], shape, alpha)
            if shape.activation == "swiglu":
                factors = _factors(ranges[second], second.whole(), alpha)
                scaled = torch.cat([torch.ones_like(factors), 1 / factors])  # [gate; up]
                _scale_rows(first, scaled)
                second.put(second.whole() * factors)
        for norm, linear in ((layer.input_layernorm, qkv), (layer.pre_mlp_layernorm, first)):
            weight = linear.whole()
            factors = _factors(ranges[linear], weight, alpha)
            for parameter in norm.parameters():
                parameter.div_(factors)
            linear.put(weight * factors)


def _factors(largest: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """[i]; 1 where the channel, or its column, is 0 throughout: nothing is to be had there."""
    columns = weight.abs().amax(dim=0)
    factors = largest.clamp_min(_LEAST) ** alpha / columns.clamp_min(_LEAST) ** (1 - alpha)
    return torch.where((largest > 0) & (columns > 0), factors.clamp_min(_LEAST), 1.0)


def _behind_values(qkv: Linear, out: Linear, largest: torch.Tensor, shape: ModelConfig, alpha: float) -> None:
    """All heads of a query group read the same values, so they share their factors."""
    groups, size = shape.query_groups, shape.head_dim
    weight = out.whole()
    by_head = largest.view(groups, -1, size)
    columns = weight.abs().amax(dim=0).view(groups, -1, size)
    factors = _factors(by_head.amax(dim=1).flatten(), columns.amax(dim=1).flatten()[None], alpha).view(groups, 1, size)
    # Rows of one group: its queries, its key, its value.
    scaled = torch.ones(groups, shape.num_attention_heads // groups + 2, size, device=weight.device)
    scaled[:, -1:] = 1 / factors
    _scale_rows(qkv, scaled.flatten())
    out.put(weight * factors.expand_as(by_head).flatten())


def _scale_rows(linear: Linear, scaled: torch.Tensor) -> None:
    """Multiply row r, and its bias, by scaled[r]."""
    linear.put(linear.whole() * scaled[:, None])
    bias = linear.module.bias
    if bias is None:
        return
    start = 0
    for shard in linear.shards:
        bias[shard.rows].mul_(scaled[start : start + shard.global_shape[0]][shard.block[0]])  # type: ignore[index, operator]
        start += shard.global_shape[0]
