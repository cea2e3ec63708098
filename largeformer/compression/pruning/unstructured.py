"""Zeros in the linear layers of a model, at once. Whole matrices, so that the zeros do not depend on the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from largeformer.compression.layerwise import walk
from largeformer.compression.linears import Linear, linears
from largeformer.compression.pruning.magnitude import kth_smallest
from largeformer.compression.pruning.masks import Amount, InputNorms, by_matrix, matrix_of_rows, smallest, wanda
from largeformer.compression.pruning.sparsegpt import Hessian, inverse_factor, sparsegpt
from largeformer.config.prune import PruneConfig
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


def pattern_problems(model: ModelConfig, prune: PruneConfig) -> list[str]:
    """Where the pattern does not divide the inputs of a linear layer."""
    if prune.kept_of is None:
        return []
    of = prune.kept_of[1]
    inputs = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size": model.ffn_size,
        "model.num_attention_heads x head size": model.num_attention_heads * model.head_dim,
    }
    if prune.method == "sparsegpt":
        inputs["prune.block_size"] = prune.block_size
    return [
        f"prune.pattern {prune.pattern} does not divide {name} {size}: choose one whose M does, or give prune.sparsity"
        for name, size in inputs.items()
        if size % of
    ]


@torch.no_grad()
def sparsify(
    model: Any, shards: Sequence[Shard], groups: ParallelGroups, shape: ModelConfig, prune: PruneConfig, batches: Sequence[Batch]
) -> None:
    """Set weights of `model` to 0 as `prune` says. Collective. `model`: as for `layerwise.walk`; `batches`: not read for magnitudes."""
    amount = Amount(prune.share, prune.kept_of)
    if prune.method == "magnitude":
        _by_magnitude(linears(model, shards, groups), groups, shape, prune, amount)
        return

    def with_norms(_: int, found: Mapping[Linear, InputNorms]) -> None:
        for linear, norms in found.items():
            _change(linear, shape, partial(wanda, norms=norms, amount=amount))

    def with_hessians(_: int, found: Mapping[Linear, Hessian]) -> None:
        for linear, hessian in found.items():
            factor, silent = inverse_factor(hessian, prune.dampening)
            change = partial(sparsegpt, factor=factor, silent=silent, amount=amount, block_size=prune.block_size)
            _change(linear, shape, change)

    if prune.method == "wanda":
        walk(model, shards, batches, groups, InputNorms, with_norms)
    else:
        walk(model, shards, batches, groups, Hessian, with_hessians)


def _change(linear: Linear, shape: ModelConfig, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    whole = by_matrix(linear.whole(), matrix_of_rows(linear, shape), change)
    if not torch.isfinite(whole).all():
        raise BadInputError(f"{linear.name} is not finite after pruning: its weights or its inputs are not; begin with a sound checkpoint")
    linear.put(whole)


def _by_magnitude(
    layers: Sequence[Sequence[Linear]], groups: ParallelGroups, shape: ModelConfig, prune: PruneConfig, amount: Amount
) -> None:
    every = [linear for layer in layers for linear in layer]
    threshold = prune.threshold
    if prune.scope == "global":
        threshold = _global_threshold(every, groups, amount.share)
    for linear in every:
        if threshold is None:
            _change(linear, shape, lambda weight: weight.masked_fill(smallest(weight.abs(), amount), 0.0))
            continue
        for shard in linear.shards:  # each rank's part by itself
            part = shard.of(shard.parameter.data)
            magnitude = part.float().abs()
            part.masked_fill_(magnitude <= threshold if prune.scope == "global" else magnitude < threshold, 0.0)


def _global_threshold(every: Sequence[Linear], groups: ParallelGroups, share: float) -> float:
    """The magnitude up to which weights go, of all linear layers together; equal ones go together."""

    def total(counts: torch.Tensor) -> torch.Tensor:
        counts = counts.to(groups.device)
        dist.all_reduce(counts, group=groups.tensor)
        return counts.cpu()

    values = [shard.of(shard.parameter.data).float().abs().contiguous() for linear in every for shard in linear.shards]
    weights = sum(linear.shape[0] * linear.shape[1] for linear in every)
    return kth_smallest([values], [int(weights * share)], total)[0]
