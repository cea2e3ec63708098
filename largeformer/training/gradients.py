"""What must happen to gradients beside DeepSpeed: sums over shared parameters, penalties, and the norm without ZeRO.

Each of the sums is silent when it is missing: the loss still falls, the gradient is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from largeformer.config.schema import OptimizerConfig
from largeformer.parallel.groups import ParallelGroups
from largeformer.training.regularization import penalty_gradient


class Scale(Protocol):
    value: float


def hook_sequence_parallel(chunks: Sequence[torch.nn.Module], groups: ParallelGroups) -> None:
    """Under sequence parallelism norms and row-parallel biases see a part of the sequence: sum their gradients over the
    tensor-parallel group. By a hook on every backward, since ZeRO 2 and 3 take gradients away during it."""

    def reduce(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=groups.tensor)
        return gradient

    for parameter in _parameters(chunks):
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(reduce)  # type: ignore[no-untyped-call]


def hook_penalties(chunks: Sequence[torch.nn.Module], config: OptimizerConfig, scale: Scale) -> None:
    """Add the gradient of `l1 * sum|w| + l2 / 2 * sum w^2` over matrices, once a step: each micro batch adds `scale.value` of it.

    Shards add their own part, so nothing is reduced. The second copy of a tied embedding adds none: the copies are summed.
    """
    l1, l2 = config.l1_penalty, config.l2_penalty
    if l1 == 0.0 and l2 == 0.0:
        return

    def hook(parameter: torch.nn.Parameter) -> None:
        parameter.register_hook(  # type: ignore[no-untyped-call]
            lambda grad: grad + scale.value * penalty_gradient(parameter.detach(), l1, l2)
        )

    for parameter in _parameters(chunks):
        if parameter.dim() > 1 and not _counted_elsewhere(parameter):
            hook(parameter)


def sum_tied_gradients(chunks: Sequence[torch.nn.Module], groups: ParallelGroups) -> None:
    """The first and the last stage each hold a copy of a tied embedding: both step by the sum of their gradients."""
    if groups.layout.pipeline == 1 or not (groups.is_first_stage or groups.is_last_stage):
        return
    chunk = chunks[0] if groups.is_first_stage else chunks[-1]
    if not chunk.share_embeddings_and_output_weights:
        return
    weight = chunk.shared_embedding_or_output_weight()  # type: ignore[operator]
    dist.all_reduce(_accumulated(weight), group=groups.embedding)


def _accumulated(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What all micro batches left: in half precision DeepSpeed adds them up in float32 beside the parameter."""
    places = (getattr(parameter, name, None) for name in ("_hp_grad", "grad_accum", "grad"))
    accumulated: torch.Tensor = next(gradient for gradient in places if gradient is not None)
    return accumulated


@torch.no_grad()
def clip_gradients(chunks: Sequence[torch.nn.Module], max_norm: float, groups: ParallelGroups) -> float:
    """Scale gradients so that their norm over the whole model is at most `max_norm` (0: never). Returns the norm before.

    Counted once: a parameter that tensor-parallel ranks share on rank 0, a tied embedding on the first stage.
    """
    gradients = [p.grad for p in _parameters(chunks) if p.grad is not None]
    counted = [p.grad for p in _parameters(chunks) if p.grad is not None and counts_here(p, groups)]
    device = gradients[0].device
    square = (
        torch.stack([g.float().square().sum(dtype=torch.float64) for g in counted]).sum() if counted else torch.zeros((), device=device)
    )
    square = square.double()
    dist.all_reduce(square, group=groups.model)
    norm = square.sqrt().item()
    if 0.0 < max_norm < norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1.0e-6))
    return norm


def counts_here(parameter: torch.nn.Parameter, groups: ParallelGroups) -> bool:
    """Whether this rank is the one of its model-parallel group that counts `parameter` (or its shard of it)."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return (sharded or groups.coordinates.tensor == 0) and not _counted_elsewhere(parameter)


def _counted_elsewhere(parameter: torch.nn.Parameter) -> bool:
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def _parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[torch.nn.Parameter]:
    for chunk in chunks:
        yield from chunk.parameters()
