"""Zeros that stay: what pruning has set to 0 in linear layers, no later training brings back.

The zero pattern is the mask: a weight that is exactly 0 in the checkpoint that a stage starts from is 0 at its end. Its gradient is
set to 0, so that with a fresh optimizer moments and update are 0 too, at any ZeRO stage; weight decay and penalties of 0 are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from largeformer.checkpoint.format import Block
from largeformer.models.shards import Shard
from largeformer.training.checkpointing import open_tensors
from largeformer.training.state import WEIGHTS

Named = Callable[[str], str]


def hold_zeros(checkpoint: Path, shards: Sequence[Shard], named: Named = str) -> None:
    """Keep the zeros of `checkpoint`'s linear layers, before the engine is built. Call it with the checkpoint that the stage started
    from, also where it resumes: a weight that training happened to make 0 is free. `named`: what a weight is called in the checkpoint.
    Collective."""
    stored = open_tensors(checkpoint, WEIGHTS)
    blocks: dict[torch.nn.Parameter, list[tuple[Shard, torch.Tensor]]] = {}
    for shard in _prunable(shards):
        held = torch.empty(shard.shape)
        stored.read([_block(shard, held, named)])
        blocks.setdefault(shard.parameter, []).append((shard, held == 0.0))
    for parameter, parts in blocks.items():
        if any(bool(zero.any()) for _, zero in parts):
            _hold(parameter, parts)


def _hold(parameter: torch.nn.Parameter, parts: Sequence[tuple[Shard, torch.Tensor]]) -> None:
    zeros = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for shard, zero in parts:
        shard.of(zeros).copy_(zero)
    parameter.register_hook(lambda gradient: gradient.masked_fill(zeros, 0.0))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Kept:
    """Over all linear layers: their weights, those that were 0 at the start, and of these the ones that are not any more."""

    weights: int
    zeros: int
    lost: int

    @property
    def sparsity(self) -> float:
        return (self.zeros - self.lost) / max(self.weights, 1)


def zeros_kept(start: Path, end: Path, shards: Sequence[Shard], named: Named = str) -> Kept:
    """What has become of `start`'s zeros in the checkpoint `end`; `shards`: those of the model. Each block is read by one rank.
    Collective; alike on every rank."""
    before, after = open_tensors(start, WEIGHTS), open_tensors(end, WEIGHTS)
    weights = zeros = lost = 0
    for shard in _prunable(shards):
        if shard.main:
            then, now = torch.empty(shard.shape), torch.empty(shard.shape)
            before.read([_block(shard, then, named)])
            after.read([_block(shard, now, str)])
            was = then == 0.0
            weights, zeros, lost = weights + was.numel(), zeros + int(was.sum()), lost + int((was & (now != 0.0)).sum())
    counts = torch.tensor([weights, zeros, lost], device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(counts)
    return Kept(*counts.tolist())


def _prunable(shards: Sequence[Shard]) -> list[Shard]:
    """Weights of the Transformer layers' linear layers."""
    return [shard for shard in shards if ".linear_" in shard.key and len(shard.shape) == 2]


def _block(shard: Shard, tensor: torch.Tensor, named: Named) -> Block:
    return Block(named(shard.key), tensor, shard.offset, shard.global_shape)
