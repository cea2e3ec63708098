"""Which part of which global tensor each parameter holds, under any layout.

Megatron-core describes this in its sharded state; here it becomes plain records, made once, before DeepSpeed takes the
parameters apart. Initialisation, parity and checkpoints all speak of the model in these terms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

# Without the first, layers share a key and the last one silently wins; without the second, so do the halves of SwiGLU.
METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": True}
VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Shard:
    """Rows `rows` (along dimension 0) of `parameter` are the block at `offset` of the global tensor `key`.

    `main` is true on exactly one of the ranks that hold the block: the one that counts it, or writes it. Rows that only pad the
    vocabulary belong to no shard: padding depends on the layout, and holds nothing.
    """

    key: str
    parameter: torch.nn.Parameter
    name: str
    rows: slice
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]
    main: bool

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block's view of `tensor`, which has the parameter's shape: the parameter itself, its gradient, its moments."""
        return tensor[self.rows] if tensor.dim() else tensor

    @property
    def block(self) -> tuple[slice, ...]:
        """Where the block lies in the global tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, self.shape, strict=True))


def describe(chunks: Sequence[torch.nn.Module], vocab_size: int) -> list[Shard]:
    """The shards of every parameter of this rank's model chunks. Call before `deepspeed.initialize`.

    `vocab_size`: without padding.
    """
    shards = []
    for index, chunk in enumerate(chunks):
        state = chunk.sharded_state_dict(metadata=dict(METADATA))  # type: ignore[operator]
        apply_factories(state)
        prefix = f"{index}." if len(chunks) > 1 else ""
        owners = {p.untyped_storage().data_ptr(): (prefix + name, p) for name, p in chunk.named_parameters()}
        for tensor in _tensors(nested_values(state)):
            shard = _shard(tensor, *owners[tensor.data.untyped_storage().data_ptr()])
            shards.append(_without_padding(shard, vocab_size) if shard.key.endswith(VOCABULARY) else shard)
    return [shard for shard in shards if 0 not in shard.shape]


def _tensors(values: Iterable[object]) -> Iterable[ShardedTensor]:
    return (value for value in values if isinstance(value, ShardedTensor))


def _shard(tensor: ShardedTensor, name: str, parameter: torch.nn.Parameter) -> Shard:
    view = tensor.data
    first = view.storage_offset() // max(parameter.stride(0), 1)
    return Shard(
        key=tensor.key,
        parameter=parameter,
        name=name,
        rows=slice(first, first + view.shape[0]),
        shape=tuple(view.shape),
        offset=tuple(tensor.global_offset),
        global_shape=tuple(tensor.global_shape),
        main=_is_main(tensor.replica_id),
    )


def _without_padding(shard: Shard, vocab_size: int) -> Shard:
    real = min(max(vocab_size - shard.offset[0], 0), shard.shape[0])
    return dataclasses.replace(
        shard,
        rows=slice(shard.rows.start, shard.rows.start + real),
        shape=(real, *shard.shape[1:]),
        global_shape=(vocab_size, *shard.global_shape[1:]),
    )


def _is_main(replica_id: int | tuple[int, ...]) -> bool:
    return not any(replica_id) if isinstance(replica_id, tuple) else replica_id == 0
