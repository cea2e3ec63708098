"""Memory of every rank, by part: model state, activations, logits, buffers, and what lies on the host or on NVMe.

Ranks of one pipeline stage hold the same, so there is a row for each stage. Model state is exact; activations are counted from the
layers (`planning/activations.py`); what the libraries themselves take is an allowance.
"""

from __future__ import annotations

from dataclasses import dataclass

from largeformer.planning.activations import (
    FULL,
    backward_bytes,
    boundary_bytes,
    chunk_bytes,
    embedding_bytes,
    head_bytes,
    recomputed_at_once,
)
from largeformer.planning.hardware import GIB
from largeformer.planning.inventory import Inventory
from largeformer.planning.schedule import held_forwards
from largeformer.planning.states import state_of
from largeformer.planning.step import Job

_CONTEXT_GIB = 0.8  # of CUDA, its kernels and matrix libraries; not counted by PyTorch's allocator
_GROUP_GIB = 0.2  # of NCCL for each kind of group that is larger than one rank
_CPU_LIBRARIES_GIB = 0.5  # of the process itself: PyTorch, Megatron-core, DeepSpeed
_FRAGMENTATION = 0.05  # of what comes and goes: blocks that the allocator holds and cannot use


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank of a pipeline stage; `ranks` of them are alike.

    activation_bytes: kept for the backward at the worst moment, what is recomputed then, and a layer's gradients. logits_bytes: the
    head's gradients and one chunk of logits. buffer_bytes: buckets, gathered weights, states between stages, gradients beside their
    final partition. allowance_bytes: fragmentation and the libraries' own. start_bytes: the weights before ZeRO 3 has parted them, with the
    libraries: each rank builds all of its tensor- and pipeline-parallel part first.
    """

    stage: int
    ranks: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    master_bytes: int
    moments_bytes: int
    activation_bytes: int
    logits_bytes: int
    buffer_bytes: int
    allowance_bytes: int
    start_bytes: int
    host_bytes: int
    nvme_bytes: int

    @property
    def state_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.master_bytes + self.moments_bytes

    @property
    def allocated_bytes(self) -> int:
        """What PyTorch's allocator holds at the worst moment."""
        return self.state_bytes + self.activation_bytes + self.logits_bytes + self.buffer_bytes

    @property
    def total_bytes(self) -> int:
        """At the worst moment of a step, or of the start."""
        return max(self.allocated_bytes + self.allowance_bytes, self.start_bytes)


def rank_memory(job: Job) -> list[RankMemory]:
    """One row for each pipeline stage."""
    return [_of_stage(job, stage) for stage in job.stages]


def ends_memory(job: Job) -> list[RankMemory]:
    """The rows of the first and the last stage: where all stages have as many layers, one of them is the fullest."""
    return [_of_stage(job, stage) for stage in {job.stages[0].stage: job.stages[0], job.stages[-1].stage: job.stages[-1]}.values()]


def fullest(rows: list[RankMemory]) -> RankMemory:
    return max(rows, key=lambda row: row.total_bytes)


def _of_stage(job: Job, stage: Inventory) -> RankMemory:
    placed = state_of(job.recipe, stage, job.deepspeed, job.layout.data)
    state = placed.device
    kept, head = _activations(job, stage), _logits(job, stage)
    waiting = boundary_bytes(job.recipe) * (4 if job.layout.pipeline > 1 else 1)
    buffers = state.buffers + state.gradient_extra + waiting
    # The reduction casts gradients to the type that is sent, when activations are gone.
    reducing = max(0, state.reducing - kept - head)
    moving = kept + head + buffers + reducing
    return RankMemory(
        stage=stage.stage,
        ranks=job.layout.tensor * job.layout.data,
        parameters=stage.elements,
        weights_bytes=state.weights,
        gradients_bytes=state.gradients,
        master_bytes=state.masters,
        moments_bytes=state.moments,
        activation_bytes=kept,
        logits_bytes=head,
        buffer_bytes=buffers + reducing,
        allowance_bytes=round(_FRAGMENTATION * moving) + _libraries(job),
        start_bytes=stage.elements * (FULL if job.recipe.train.precision == "fp32" else 2) + _libraries(job),
        host_bytes=placed.host,
        nvme_bytes=placed.nvme,
    )


def _activations(job: Job, stage: Inventory) -> int:
    """Kept when the stage holds most micro batches, and what the layer adds that is recomputed and goes backward then."""
    fused = job.cluster.fuses
    held = held_forwards(stage.stage, job.layout.pipeline, job.layout.virtual, job.microbatches)
    kept = sum(count * chunk_bytes(job.recipe, layers, fused) for count, layers in zip(held, stage.chunks, strict=True))
    if stage.has_embedding:
        kept += held[0] * embedding_bytes(job.recipe, fused)
    return kept + backward_bytes(job.recipe) + max(recomputed_at_once(job.recipe, layers, fused) for layers in stage.chunks)


def _logits(job: Job, stage: Inventory) -> int:
    return sum(head_bytes(job.recipe, job.cluster.fuses)) if stage.has_head else 0


def _libraries(job: Job) -> int:
    if job.cluster.gpu.family == "cpu":
        return round(_CPU_LIBRARIES_GIB * GIB)
    layout = job.layout
    groups = sum(degree > 1 for degree in (layout.tensor, layout.pipeline, layout.data))
    return round((_CONTEXT_GIB + groups * _GROUP_GIB) * GIB)
