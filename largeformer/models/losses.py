"""Losses over a vocabulary that tensor-parallel ranks share, fused with the output projection.

`n` tokens, `h` hidden, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Share:
    """The ids that this rank holds: `size` from `start`, of which the first `valid` are real and the rest padding."""

    start: int
    size: int
    valid: int
    group: dist.ProcessGroup

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """In place, over the ranks that share the vocabulary. Collective, as is `largest`."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: torch.Tensor, operation: Any) -> torch.Tensor:
        if dist.get_world_size(self.group) > 1:
            dist.all_reduce(values, operation, group=self.group)
        return values


class TokenLoss(Protocol):
    """A loss of each token by its logits, with its gradient."""

    def __call__(
        self, logits: torch.Tensor, rows: slice, labels: torch.Tensor, token_weights: torch.Tensor, share: Share
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits: [n, v]; rows: which tokens of the micro batch these n are; labels: int64[n]; token_weights: float32[n].

        Returns: the gradient of the weighted losses' sum by the logits, float32[n, v], 0 where they pad; the weighted losses, float32[n].
        Collective over the ranks that share the vocabulary.
        """


class HeadLoss(torch.autograd.Function):
    """Output projection and loss, `chunk` tokens at a time, so that the logits never stand whole in memory.

    Both gradients are made in the forward pass, while a chunk's probabilities are at hand, and scaled in the backward one
    (the method of Liger Kernel, Hsu et al. 2024, arXiv:2410.10989, here for vocabulary-parallel weights; the reductions over
    the vocabulary follow Shoeybi et al. 2019, arXiv:1909.08053, section 3). Padded ids get no probability.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        token_weights: torch.Tensor,
        vocab_size: int,
        chunk: int,
        group: dist.ProcessGroup,
        with_gradients: bool,
        token_losses: list[torch.Tensor] | None = None,
        loss: TokenLoss | None = None,
    ) -> torch.Tensor:
        """hidden: [n, h]; weight: [v, h]; labels: int64[n]; token_weights: float32[n]; with_gradients: whether a backward follows,
        which cannot be told in here, where gradients are always off; token_losses: takes the weighted losses, float32[chunk] each;
        loss: cross-entropy where none is given.

        Returns: float32[], the sum of the weighted losses.
        """
        size = weight.shape[0]
        start = dist.get_rank(group) * size
        share = Share(start, size, valid=min(max(vocab_size - start, 0), size), group=group)
        d_hidden = torch.empty_like(hidden) if with_gradients and hidden.requires_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, min(begin + chunk, hidden.shape[0]))
            d_logits, losses = (loss or cross_entropy)(hidden[rows] @ weight.t(), rows, labels[rows], token_weights[rows], share)
            total += losses.sum()
            if token_losses is not None:
                token_losses.append(losses)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_weight is not None and weight.dtype == torch.float32:
                d_weight.addmm_(d_logits.t(), hidden[rows])
            elif d_weight is not None:
                d_weight += d_logits.t() @ hidden[rows]
        ctx.d_hidden, ctx.d_weight, ctx.dtype = d_hidden, d_weight, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grads
        d_hidden = None if ctx.d_hidden is None else ctx.d_hidden.mul_(scale)
        d_weight = None if ctx.d_weight is None else ctx.d_weight.mul_(scale).to(ctx.dtype)
        ctx.d_hidden = ctx.d_weight = None
        return d_hidden, d_weight, None, None, None, None, None, None, None, None


def cross_entropy(
    logits: torch.Tensor, rows: slice, labels: torch.Tensor, token_weights: torch.Tensor, share: Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """`-log p(label)`; see `TokenLoss`."""
    scores = logits.float()
    scores[:, share.valid :] = float("-inf")
    highest = share.largest(scores.max(dim=-1).values)
    scores -= highest.unsqueeze(-1)
    local = labels - share.start
    here = (local >= 0) & (local < share.size)
    local = local.clamp(0, share.size - 1).unsqueeze(-1)
    # Where the label lives elsewhere the gathered score may be that of padding: replace it, never multiply -inf by 0.
    target = torch.where(here, scores.gather(-1, local).squeeze(-1), 0.0)
    scores.exp_()
    partition, target = share.sum(torch.stack([scores.sum(dim=-1), target]))
    losses = (partition.log() - target) * token_weights
    scores *= (token_weights / partition).unsqueeze(-1)
    scores.scatter_add_(-1, local, -(here * token_weights).unsqueeze(-1))
    return scores, losses


_NOTHING = -1.0e30
"""The score of an id that pads: no probability, and differences of two such are finite."""


def log_softmax(scores: torch.Tensor, share: Share) -> torch.Tensor:
    """Over the whole vocabulary, of this rank's share. scores: float32[n, v], overwritten. Returns: float32[n, v]."""
    scores[:, share.valid :] = _NOTHING
    scores -= share.largest(scores.max(dim=-1).values).unsqueeze(-1)
    partition = share.sum(scores.exp().sum(dim=-1))
    scores -= partition.log().unsqueeze(-1)
    return scores
