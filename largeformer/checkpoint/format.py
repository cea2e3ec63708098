"""Blocks of global tensors <-> safetensors files, by PyTorch's distributed checkpoint.

Every rank writes its own file of the blocks that it counts; a file's header says where each block lies in its global tensor.
Any layout reads any other's files: it asks for its blocks and the library finds the overlaps. Nothing is pickled.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from largeformer.errors import BadInputError


@dataclass(frozen=True)
class Block:
    """`tensor` is the part at `offset` of the global tensor `name`, which has `global_shape`."""

    name: str
    tensor: torch.Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.name, torch.Size(self.offset))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(offsets=torch.Size(self.offset), sizes=self.tensor.size())


def write_blocks(folder: Path, blocks: Iterable[Block]) -> None:
    """Write this rank's blocks into `folder`, at most one of each tensor. Collective; together the ranks' blocks cover each global
    tensor exactly once."""
    planner = _SavePlanner(blocks)
    # Without a process group the library writes alone, which is what a single process wants, and warns of it.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=not dist.is_initialized())


def read_blocks(folder: Path, blocks: Sequence[Block]) -> None:
    """Fill the blocks' tensors in place. Collective. Raises BadInputError where the files do not cover a block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = dcp.HuggingFaceStorageReader(str(folder))
        try:
            dcp.load({}, storage_reader=reader, planner=_LoadPlanner(blocks, folder), no_dist=not dist.is_initialized())
        except dcp.api.CheckpointException as error:
            # Raised on every rank, around what any of them met.
            found = [failure for failure, _ in error.failures.values() if isinstance(failure, BadInputError)]
            if found:
                raise BadInputError(list(dict.fromkeys(problem for failure in found for problem in failure.problems))) from None
            raise


class _SavePlanner(dcp.DefaultSavePlanner):
    """Plans exactly the given blocks; the default one would take them from a state dict of sharded tensors."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = {block.index: block for block in blocks}
        assert len({index.fqn for index in self._blocks}) == len(self._blocks), "a file would keep only the last block of a tensor"

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([self._item(block) for block in self._blocks.values()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._blocks[write_item.index].tensor.detach().contiguous().cpu()

    @staticmethod
    def _item(block: Block) -> WriteItem:
        data = TensorWriteData(
            chunk=block.chunk, properties=TensorProperties(dtype=block.tensor.dtype), size=torch.Size(block.global_shape)
        )
        return WriteItem(index=block.index, type=WriteItemType.SHARD, tensor_data=data)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def __init__(self, blocks: Sequence[Block], folder: Path) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = {block.index: block for block in blocks}
        self._folder = folder

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "set_up_planner comes first"
        items: list[ReadItem] = []
        for block in self._blocks.values():
            stored = self.metadata.state_dict_metadata.get(block.name)
            reads = create_read_items_for_chunk_list(block.name, stored, [block.chunk]) if _matches(stored, block) else []
            if sum(math.prod(read.lengths) for read in reads) != block.tensor.numel():
                found = f"of shape {list(stored.size)}" if isinstance(stored, TensorStorageMetadata) else "absent"
                raise BadInputError(
                    f"{self._folder} does not hold {block.name} of shape {list(block.global_shape)} (it is {found}): "
                    "the checkpoint belongs to another model, or is incomplete"
                )
            items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        target = self._blocks[read_item.dest_index].tensor.detach()
        return target[tuple(slice(o, o + n) for o, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: `resolve_tensor` gave out the destination itself."""


def _matches(stored: object, block: Block) -> TypeGuard[TensorStorageMetadata]:
    return isinstance(stored, TensorStorageMetadata) and tuple(stored.size) == block.global_shape


logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
