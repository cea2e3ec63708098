"""Micro batches through model chunks by Megatron-core's schedules: forward only, or with backward, over any pipeline.

The modules are given; what they compute is theirs. Without a pipeline the schedule is a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


def forward_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The summed loss of `batch` (float32[]) on the last pipeline stage, hidden states on the others."""
    output: torch.Tensor = model(batch.tokens, batch.position_ids, batch.attention_mask(), labels=batch.labels, loss_mask=batch.loss_mask)
    return output


@torch.no_grad()
def evaluate_loss(chunks: Sequence[torch.nn.Module], batches: Sequence[Batch], groups: ParallelGroups) -> torch.Tensor:
    """This data rank's summed loss over `batches`, float64[], on every pipeline stage. The chunks must be in eval mode."""
    if groups.layout.pipeline > 1:
        losses = run_pipeline(chunks, batches, groups, scale=1.0, forward_only=True)
    else:
        losses = [forward_loss(chunks[0], batch) for batch in batches]
    return groups.from_last_stage(_total(losses, batches[0].tokens.device))


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[Batch],
    groups: ParallelGroups,
    scale: float,
    forward_only: bool = False,
) -> list[torch.Tensor]:
    """One pass of the 1F1B or interleaved schedule. The backward starts from `scale` times each micro batch's summed loss.

    Returns: the unscaled summed losses, float32[] each, on the last stage; an empty list on the others.
    """
    from megatron.core.pipeline_parallel import schedules

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # With `calculate_per_token_loss` the schedule leaves the loss alone: it is normalised by the whole batch already.
        return output * scale, torch.ones((), dtype=torch.int), output.detach()

    def step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        return forward_loss(model, next(iterator)), loss_of

    interleaved = len(chunks) > 1
    schedule = (
        schedules.forward_backward_pipelining_with_interleaving
        if interleaved
        else schedules.forward_backward_pipelining_without_interleaving
    )
    rows, length = batches[0].tokens.shape
    return schedule(  # type: ignore[no-any-return]
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in chunks] if interleaved else iter(batches),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def _total(losses: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([loss.detach().double() for loss in losses]).sum() if losses else torch.zeros((), dtype=torch.float64, device=device)
