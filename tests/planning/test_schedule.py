"""The order of a pipeline's operations against Megatron-core's own schedules, which run here for each stage alone: what a neighbour would
send is made up, and each forward and backward step is written down instead of computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from largeformer.planning.schedule import Op, held_forwards, op_order

# pipeline, virtual stages, micro batches
SHAPES = [
    (2, 1, 1),
    (2, 1, 4),
    (4, 1, 2),
    (4, 1, 8),
    (8, 1, 16),
    (2, 2, 2),
    (2, 2, 4),
    (4, 2, 4),
    (4, 2, 8),
    (4, 3, 12),
    (8, 2, 16),
    (3, 4, 9),
]


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), SHAPES)
def test_order_is_that_of_megatron(pipeline: int, virtual: int, microbatches: int) -> None:
    for stage in range(pipeline):
        assert op_order(stage, pipeline, virtual, microbatches) == recorded(stage, pipeline, virtual, microbatches)


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), SHAPES)
def test_held_micro_batches_are_the_most_that_wait(pipeline: int, virtual: int, microbatches: int) -> None:
    for stage in range(pipeline):
        waiting = most = 0
        for op in op_order(stage, pipeline, virtual, microbatches):
            waiting += -1 if op.backward else 1
            most = max(most, waiting)
        assert sum(held_forwards(stage, pipeline, virtual, microbatches)) == most
        assert waiting == 0


def recorded(stage: int, pipeline: int, virtual: int, microbatches: int) -> list[Op]:
    """What the library's schedule does on `stage`."""
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.transformer.transformer_config import TransformerConfig

    interleaved = virtual > 1
    config = TransformerConfig(
        num_layers=pipeline * virtual,
        hidden_size=8,
        num_attention_heads=1,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if interleaved else None,
        pipeline_dtype=torch.float32,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=False,
    )
    log = Log()
    chunks = [Chunk(config, number) for number in range(virtual)]
    group = SimpleNamespace(rank=lambda: stage, size=lambda: pipeline)
    one = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    schedule = getattr(schedules, f"forward_backward_pipelining_with{'' if interleaved else 'out'}_interleaving")
    with (
        mock.patch.object(schedules, "forward_step", log.forward),
        mock.patch.object(schedules, "backward_step", log.backward),
        mock.patch.object(schedules.torch, "zeros", lambda *shape, **kwargs: torch.tensor(0)),
    ):
        schedule(
            forward_step_func=None,
            data_iterator=[iter(())] * virtual,
            model=chunks,
            num_microbatches=microbatches,
            seq_length=8,
            micro_batch_size=1,
            p2p_communicator=neighbours(group, config),
            pg_collection=SimpleNamespace(tp=one, cp=one, embd=None, pos_embd=None, pp=group, dp_cp=one),
        )
    return log.ops


class Chunk(torch.nn.Module):
    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.number, self.model_type = config, number, None


class Log:
    """Stands in for the library's forward and backward steps. Within a chunk both take micro batches in turn."""

    def __init__(self) -> None:
        self.ops: list[Op] = []

    def forward(self, step: Any, data: Any, model: Chunk, *args: Any, **kwargs: Any) -> tuple[Any, int]:
        self._add(False, model.number)
        assert kwargs["current_microbatch"] == self.ops[-1].microbatch
        return Output(model.number), 0

    def backward(self, given: Any, output: Any, *args: Any) -> torch.Tensor:
        self._add(True, output.chunk)
        return torch.zeros(1)

    def _add(self, backward: bool, chunk: int) -> None:
        before = sum(op.backward == backward and op.chunk == chunk for op in self.ops)
        self.ops.append(Op(backward, before, chunk))


class Output(list[torch.Tensor]):
    """What a chunk sends on, with its number."""

    def __init__(self, chunk: int) -> None:
        super().__init__([torch.zeros(1)])
        self.chunk = chunk


def neighbours(group: Any, config: Any) -> Any:
    """The library's communicator, for which all that is asked for is there at once."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    def communicate(*, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool, **kwargs: Any) -> Any:
        wanted = {
            "send_next": tensor_send_next is not None,
            "send_prev": tensor_send_prev is not None,
            "recv_prev": recv_prev,
            "recv_next": recv_next,
        }
        handles = {name: mock.Mock() for name, is_wanted in wanted.items() if is_wanted}
        return torch.zeros(1) if recv_prev else None, torch.zeros(1) if recv_next else None, handles

    communicator = P2PCommunicator.__new__(P2PCommunicator)
    communicator.pp_group, communicator.config = group, config
    communicator.virtual_pipeline_model_parallel_size = config.virtual_pipeline_model_parallel_size
    communicator._communicate = communicate
    return communicator
