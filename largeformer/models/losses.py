"""Cross-entropy over a vocabulary that tensor-parallel ranks share, fused with the output projection.

`n` tokens, `h` hidden, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class HeadCrossEntropy(torch.autograd.Function):
    """Output projection and cross-entropy, `chunk` tokens at a time, so that the logits never stand whole in memory.

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
    ) -> torch.Tensor:
        """hidden: [n, h]; weight: [v, h]; labels: int64[n]; token_weights: float32[n]; with_gradients: whether a backward follows,
        which cannot be told in here, where gradients are always off; token_losses: takes the weighted losses, float32[chunk] each.

        Returns: float32[], the sum of `token_weights * -log p(label)`.
        """
        share = weight.shape[0]
        start = dist.get_rank(group) * share
        vocabulary = _Share(start, share, valid=min(max(vocab_size - start, 0), share), group=group)
        d_hidden = torch.empty_like(hidden) if with_gradients and hidden.requires_grad else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradients and weight.requires_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            d_logits, losses = _chunk(hidden[rows] @ weight.t(), labels[rows], token_weights[rows], vocabulary)
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
        return d_hidden, d_weight, None, None, None, None, None, None, None


class _Share:
    """Which ids this rank holds: `size` from `start`, of which the first `valid` are real and the rest padding."""

    def __init__(self, start: int, size: int, valid: int, group: dist.ProcessGroup) -> None:
        self.start, self.size, self.valid, self.group = start, size, valid, group


def _chunk(
    logits: torch.Tensor, labels: torch.Tensor, token_weights: torch.Tensor, vocabulary: _Share
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns: the gradient of the weighted loss by the logits, float32[n, v], and the weighted losses, float32[n]."""
    scores = logits.float()
    scores[:, vocabulary.valid :] = float("-inf")
    highest = scores.max(dim=-1).values
    _reduce(highest, dist.ReduceOp.MAX, vocabulary.group)
    scores -= highest.unsqueeze(-1)
    local = labels - vocabulary.start
    here = (local >= 0) & (local < vocabulary.size)
    local = local.clamp(0, vocabulary.size - 1).unsqueeze(-1)
    # Where the label lives elsewhere the gathered score may be that of padding: replace it, never multiply -inf by 0.
    target = torch.where(here, scores.gather(-1, local).squeeze(-1), 0.0)
    scores.exp_()
    sums = torch.stack([scores.sum(dim=-1), target])
    _reduce(sums, dist.ReduceOp.SUM, vocabulary.group)
    partition, target = sums
    losses = (partition.log() - target) * token_weights
    scores *= (token_weights / partition).unsqueeze(-1)
    scores.scatter_add_(-1, local, -(here * token_weights).unsqueeze(-1))
    return scores, losses


def _reduce(values: torch.Tensor, operation: Any, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(values, operation, group=group)
