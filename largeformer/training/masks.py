"""Zeros that stay: what pruning has set to 0 in linear layers, no later training brings back.

The zero pattern is the mask: a weight that is exactly 0 in the checkpoint that a stage starts from is 0 at its end. Its gradient is
set to 0, so that with a fresh optimizer moments and update are 0 too, at any ZeRO stage; weight decay and penalties of 0 are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from largeformer.checkpoint.format import Block
from largeformer.models.shards import Shard
from largeformer.training.checkpointing import open_tensors
from largeformer.training.state import WEIGHTS


def hold_zeros(checkpoint: Path, shards: Sequence[Shard], named: Callable[[str], str] = str) -> None:
    """Keep the zeros of `checkpoint`'s linear layers in training: call it before the engine is built, with the checkpoint that the stage
    started from, also where it resumes: a weight that training happened to make 0 is free. `named`: what a weight is called in there.
    Collective."""
    stored = open_tensors(checkpoint, WEIGHTS)
    found: dict[torch.nn.Parameter, list[tuple[Shard, torch.Tensor]]] = {}
    for shard in shards:
        if ".linear_" in shard.key and len(shard.shape) == 2:
            held = torch.empty(shard.shape)
            stored.read([Block(named(shard.key), held, shard.offset, shard.global_shape)])
            found.setdefault(shard.parameter, []).append((shard, held == 0.0))
    for parameter, parts in found.items():
        if any(bool(zero.any()) for _, zero in parts):
            _hold(parameter, parts)


def _hold(parameter: torch.nn.Parameter, parts: Sequence[tuple[Shard, torch.Tensor]]) -> None:
    zeros = torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
    for shard, zero in parts:
        shard.of(zeros).copy_(zero)
    parameter.register_hook(lambda gradient: gradient.masked_fill(zeros, 0.0))  # type: ignore[no-untyped-call]
