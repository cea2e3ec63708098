"""Loss over held-out text: nats per token, perplexity, bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.parallel.pipeline import evaluate_loss

Forward = Callable[[Sequence[torch.nn.Module], Sequence[Batch], ParallelGroups], torch.Tensor]


@dataclass(frozen=True)
class LossTotal:
    """The summed loss in nats over `tokens` predicted tokens, which stand for `bytes` bytes of UTF-8 text."""

    loss_sum: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token; NaN where no token was predicted."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, which nats per token are not; NaN where there is no text."""
        return self.loss_sum / math.log(2) / self.bytes if self.bytes else math.nan


def evaluate(
    chunks: Sequence[torch.nn.Module],
    batches: Iterable[Sequence[Batch]],
    groups: ParallelGroups,
    token_bytes: npt.NDArray[np.int32],
    forward: Forward = evaluate_loss,
) -> LossTotal:
    """The loss over this data rank's `batches`, summed over the data-parallel ranks, each label that counts once. Alike on
    every rank; collective.

    token_bytes: int32[v], the bytes of text that each id stands for. The data-parallel ranks may have different numbers of
    batches, unless ZeRO 3 has parted the weights: then every forward is collective. The chunks' modes are left as found.
    """
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    device = next(chunks[0].parameters()).device
    sizes = torch.from_numpy(np.ascontiguousarray(token_bytes)).to(device)
    # Loss, tokens and bytes; float64 counts exactly to 2^53.
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for group in batches:
        moved = [batch.to(device) for batch in group]
        totals[0] += forward(chunks, moved, groups)
        for batch in moved:
            counted = batch.loss_mask > 0
            totals[1] += counted.sum()
            totals[2] += sizes[batch.labels[counted]].sum()
    dist.all_reduce(totals, group=groups.data)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    loss_sum, tokens, text_bytes = totals.tolist()
    return LossTotal(loss_sum, round(tokens), round(text_bytes))
