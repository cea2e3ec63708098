"""The linear layers of a model's Transformer layers, whole weights and whole inputs of them under tensor parallelism.

What pruning and quantization compute, they compute on whole matrices: one layer's at a time, alike on every rank, so that a result
does not depend on the layout. `o` output, `i` input channels, `n` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear

from largeformer.models.shards import Shard
from largeformer.parallel.groups import ParallelGroups

# In the order in which they compute; the library makes them in another.
_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True, eq=False)
class Linear:
    """One linear layer. name: of the module, such as `decoder.layers.3.mlp.linear_fc1`. shards: this rank's blocks of its weight, which
    are one, or gate and up of a gated feed-forward layer, in this order. split_input: row-parallel: each rank has a part of the
    input channels; otherwise each has all of them, and a part of the outputs."""

    name: str
    layer: int
    module: torch.nn.Module
    shards: tuple[Shard, ...]
    split_input: bool
    groups: ParallelGroups

    @property
    def keys(self) -> tuple[str, ...]:
        """Global names of its weights."""
        return tuple(shard.key for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int]:
        """Whole: (o, i)."""
        return sum(shard.global_shape[0] for shard in self.shards), self.shards[0].global_shape[1]

    def whole(self) -> torch.Tensor:
        """[o, i], in the weight's dtype, on every rank: the global tensors of `keys` below each other. Collective."""
        axis = 1 if self.split_input else 0
        return torch.cat([_joined(shard.of(shard.parameter.data), axis, self.groups) for shard in self.shards])

    def put(self, whole: torch.Tensor) -> None:
        """Set this rank's part from [o, i]. What ranks were given must be alike."""
        start = 0
        with torch.no_grad():
            for shard in self.shards:
                rows = whole[start : start + shard.global_shape[0]]
                shard.of(shard.parameter.data).copy_(rows[shard.block])
                start += shard.global_shape[0]

    def whole_input(self, features: torch.Tensor) -> torch.Tensor:
        """[n, i] from this rank's [n, i or i / t]. Collective over tensor parallelism where the input is split."""
        return _joined(features, 1, self.groups) if self.split_input else features


def linears(model: torch.nn.Module, shards: Sequence[Shard], groups: ParallelGroups) -> list[list[Linear]]:
    """The linear layers of each of this model's Transformer layers, in the order in which they compute. One chunk, one pipeline stage."""
    found: list[list[Linear]] = []
    for index, layer in enumerate(model.decoder.layers):  # type: ignore[union-attr, arg-type]
        modules = [(name, module) for kind in _LINEAR for name, module in layer.named_modules() if name.endswith(kind)]
        found.append([_linear(f"decoder.layers.{index}.{name}", index, module, shards, groups) for name, module in modules])
    return found


def _linear(name: str, layer: int, module: torch.nn.Module, shards: Sequence[Shard], groups: ParallelGroups) -> Linear:
    own = tuple(shard for shard in shards if shard.parameter is module.weight)
    assert own and [shard.rows.start for shard in own] == sorted(shard.rows.start for shard in own), f"{name} has its shards in order"
    return Linear(name, layer, module, own, isinstance(module, RowParallelLinear), groups)


def _joined(part: torch.Tensor, axis: int, groups: ParallelGroups) -> torch.Tensor:
    if groups.layout.tensor == 1:
        return part.clone()
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=groups.tensor)
    return torch.cat(parts, dim=axis)
