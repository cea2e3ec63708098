"""L1 and L2 penalties on the loss: `l1 * sum |w| + l2 / 2 * sum w^2`, with gradient `l1 * sign(w) + l2 * w`.

Unlike AdamW's decoupled weight decay, this gradient passes through the optimizer's moments and through clipping. The caller
passes the parameters that weight decay applies to (matrices).

The gradient is elementwise: every rank adds its own shard's part, and no reduction is needed, whatever the sharding. It must
be added once an optimizer step, after the gradients of replicated copies (tied embeddings across stages) were summed; before
or after the mean over data-parallel ranks makes no difference, since each rank adds the same.
The value is a sum over the model, so that a copy must not be counted twice: the caller says which parameters count here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def penalty_gradient(weight: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """Gradient of the penalty at `weight`, of its shape and dtype; at 0 the subgradient 0 is taken."""
    return l1 * torch.sign(weight) + l2 * weight


@torch.no_grad()
def penalty_gradients(parameters: Iterable[torch.nn.Parameter], l1: float, l2: float, scale: float = 1.0) -> None:
    """Adds the penalty's gradient, times `scale`, to `grad` of each parameter, in place.

    `scale` is what the other gradients are multiplied by at this point (the fp16 loss scale, say). A trainable parameter that
    got no gradient from the loss gets the penalty's; a frozen one is left alone.
    """
    if l1 == 0.0 and l2 == 0.0:
        return
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        addition = penalty_gradient(parameter, l1, l2).mul_(scale)
        parameter.grad = addition if parameter.grad is None else parameter.grad.add_(addition)


@torch.no_grad()
def penalty_value(
    parameters: Iterable[torch.nn.Parameter], counts_here: Callable[[torch.nn.Parameter], bool], l1: float, l2: float
) -> float:
    """This rank's part of the penalty, in float64; the sum over the ranks that hold one copy of the model (TP x PP) is the penalty.

    `counts_here` is False for a parameter that another of these ranks counts: a tensor-parallel duplicate on TP rank above 0,
    or the last stage's copy of a tied embedding.
    """
    total = 0.0
    for parameter in parameters:
        if parameter.requires_grad and counts_here(parameter):
            weight = parameter.detach().double()
            total += l1 * weight.abs().sum().item() + 0.5 * l2 * weight.square().sum().item()
    return total
