"""Process groups as values. The only file that touches Megatron-core's `parallel_state`.

Megatron-core keeps its groups in module globals and reads them inside its layers, so they must be set up there; everything
of ours receives a `ParallelGroups` instead. DeepSpeed receives its `mpu`.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from largeformer.errors import BadInputError
from largeformer.layout import Coordinates, Layout

TIMEOUT = datetime.timedelta(minutes=30)


class DeepSpeedMpu:
    """What DeepSpeed asks of a "model parallel unit".

    Norms and overflow flags are reduced over the whole model (tensor x pipeline), so that is the group. The rank, though, is
    the tensor rank: DeepSpeed counts a parameter that tensor-parallel ranks share on rank 0 only, and every pipeline stage
    must count its own. No sequence-parallel method is defined: DeepSpeed would take it for Ulysses.
    """

    def __init__(self, model: dist.ProcessGroup, data: dist.ProcessGroup, tensor_rank: int) -> None:
        self._model, self._data, self._tensor_rank = model, data, tensor_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self._model)

    def get_model_parallel_rank(self) -> int:
        return self._tensor_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self._data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self._data)


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's place in the layout and the groups that it belongs to.

    `collection` is Megatron-core's own record of the groups, which its modules and schedules take as an argument.
    """

    layout: Layout
    rank: int
    collection: Any

    @cached_property
    def coordinates(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    @property
    def tensor(self) -> dist.ProcessGroup:
        return self.collection.tp  # type: ignore[no-any-return]

    @property
    def data(self) -> dist.ProcessGroup:
        return self.collection.dp  # type: ignore[no-any-return]

    @property
    def pipeline(self) -> dist.ProcessGroup:
        return self.collection.pp  # type: ignore[no-any-return]

    @property
    def model(self) -> dist.ProcessGroup:
        """Tensor x pipeline: the ranks that hold one copy of the model."""
        return self.collection.mp  # type: ignore[no-any-return]

    @property
    def embedding(self) -> dist.ProcessGroup | None:
        """First and last stage, which share tied embeddings; None elsewhere."""
        return self.collection.embd  # type: ignore[no-any-return]

    @property
    def is_first_stage(self) -> bool:
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        return self.coordinates.pipeline == self.layout.pipeline - 1

    def mpu(self) -> DeepSpeedMpu:
        return DeepSpeedMpu(self.model, self.data, self.coordinates.tensor)

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """`values` as the last pipeline stage has them, on every stage. In place."""
        if self.layout.pipeline > 1:
            dist.broadcast(values, src=dist.get_global_rank(self.pipeline, self.layout.pipeline - 1), group=self.pipeline)
        return values

    @property
    def device(self) -> torch.device:
        """Where a tensor must be for ranks to send it."""
        return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

    def largest(self, value: float) -> float:
        """The largest of all ranks' values, on every rank. Collective over the world."""
        return self.largest_of([value])[0]

    def largest_of(self, values: Sequence[float]) -> list[float]:
        """The same of each of several values, in one reduction."""
        held = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return held.tolist()


def join_world(rank: int, world_size: int, init_method: str, device: torch.device) -> None:
    """Join the world of `world_size` processes: NCCL on GPUs, gloo on CPUs. Safe to call again. Raises BadInputError where something else
    listens at the port that rank 0 would."""
    if not dist.is_initialized():
        on_gpu = device.type == "cuda"
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                init_method=init_method,
                rank=rank,
                world_size=world_size,
                timeout=TIMEOUT,
                device_id=device if on_gpu else None,
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise BadInputError(
                f"the ranks cannot meet at {init_method}: that port is taken, perhaps by another run on this machine; choose another "
                "(deepspeed --master_port, or MASTER_PORT)"
            ) from error


def create_groups(layout: Layout) -> ParallelGroups:
    """Cut the joined world by `layout`. Collective: every rank calls it. One layout at a time; see `destroy_groups`."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    assert dist.get_world_size() == layout.world_size, "the layout was made for another world"
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        create_gloo_process_groups=False,
    )
    return ParallelGroups(layout=layout, rank=dist.get_rank(), collection=ProcessGroupCollection.use_mpu_process_groups())


def destroy_groups() -> None:
    """Undo the layout, so that another can be made in the same world (tests, evaluation after training).

    Megatron-core forgets its groups without ending them, and each of some twenty keeps its threads. What was built on them, a
    model and its engine, lies in reference cycles and goes here as well.
    """
    from megatron.core import parallel_state

    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()
