"""Whole tensors from shards, and shards from whole tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from largeformer.errors import BadInputError
from largeformer.models.shards import Shard


@dataclass(frozen=True)
class _Place:
    """Where a block that some rank holds lies in its global tensor."""

    key: str
    block: tuple[slice, ...]
    global_shape: tuple[int, ...]
    dtype: torch.dtype


def gather_full(shards: Sequence[Shard], values: Callable[[Shard], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The global tensors that all ranks' shards make up, on the CPU of rank 0; empty on the others. Collective over the world.

    `values(shard)` gives the block, of `shard.shape`: of the parameter, its gradient, or a moment. Every rank calls it for each
    of its shards in their order, so it may itself be collective over the ranks that share them.
    """
    # All values come first: one that is collective must not wait for a rank that waits here.
    made = [(shard, values(shard).detach()) for shard in shards]
    mine = [(shard, value) for shard, value in made if shard.main]
    places: list[list[_Place]] = [[]] * dist.get_world_size()
    dist.all_gather_object(places, [_Place(shard.key, shard.block, shard.global_shape, value.dtype) for shard, value in mine])
    if dist.get_rank() != 0:
        for _, value in mine:
            dist.send(value.contiguous(), dst=0)
        return {}
    whole: dict[str, torch.Tensor] = {}
    covered: Counter[str] = Counter()
    for rank, blocks in enumerate(places):
        for number, place in enumerate(blocks):
            if place.key not in whole:
                whole[place.key] = torch.empty(place.global_shape, dtype=place.dtype)
            target = whole[place.key][place.block]
            if rank == 0:
                target.copy_(mine[number][1])
            else:
                received = torch.empty(target.shape, dtype=place.dtype, device=made[0][1].device)
                dist.recv(received, src=rank)
                target.copy_(received)
            covered[place.key] += target.numel()
    assert all(covered[key] == tensor.numel() for key, tensor in whole.items()), "the ranks' main shards do not tile the tensors"
    return whole


@torch.no_grad()
def load_full(shards: Sequence[Shard], state: Mapping[str, torch.Tensor]) -> None:
    """Copy each shard's block out of the global tensors, in place. Raises BadInputError where one is missing or misshapen."""
    wrong = [
        f"the weights hold no {shard.key}; this model needs it"
        if shard.key not in state
        else f"{shard.key} has the shape {list(state[shard.key].shape)}; this model needs {list(shard.global_shape)}"
        for shard in shards
        if shard.key not in state or tuple(state[shard.key].shape) != shard.global_shape
    ]
    if wrong:
        raise BadInputError(sorted(set(wrong)))
    for shard in shards:
        shard.of(shard.parameter.data).copy_(state[shard.key][shard.block])
