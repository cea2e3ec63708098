"""Whole tensors from shards, and shards from whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from largeformer.errors import BadInputError
from largeformer.models.shards import Shard


def gather_full(shards: Sequence[Shard], values: Callable[[Shard], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The global tensors that all ranks' shards make up, on the CPU of rank 0; empty on the others. Collective over the world.

    `values(shard)` gives the block, of `shard.shape`: of the parameter, its gradient, or a moment. Every rank calls it for each
    of its shards in their order, so it may itself be collective over the ranks that share them.
    """
    # All values come first: one that is collective must not wait for a rank that waits here.
    mine = [(shard, value) for shard in shards if (value := values(shard).detach()) is not None and shard.main]
    places = [(shard.key, shard.block, shard.global_shape, value.dtype) for shard, value in mine]
    everywhere: list[list[tuple[str, tuple[slice, ...], tuple[int, ...], torch.dtype]]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everywhere, places)
    if dist.get_rank() != 0:
        for _, value in mine:
            dist.send(value.contiguous(), dst=0)
        return {}
    whole: dict[str, torch.Tensor] = {}
    for rank, blocks in enumerate(everywhere):
        for index, (key, block, shape, dtype) in enumerate(blocks):
            target = whole.setdefault(key, torch.empty(shape, dtype=dtype))
            if rank == 0:
                target[block] = mine[index][1].cpu()
                continue
            received = torch.empty([part.stop - part.start for part in block], dtype=dtype, device=mine[0][1].device if mine else "cpu")
            dist.recv(received, src=rank)
            target[block] = received.cpu()
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
