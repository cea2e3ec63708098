"""L1 and L2 penalties on the loss: `l1 * sum |w| + l2 / 2 * sum w^2`, over the matrices of the model.

Unlike AdamW's decoupled weight decay, their gradient passes through clipping and through the optimizer's moments. It is
elementwise, so that each shard adds its own part and nothing is reduced. `training/gradients.py` adds it once an optimizer
step, and for one only of two copies of a tied embedding, whose gradients are summed. The loss that is reported is without it.
"""

from __future__ import annotations

import torch


def penalty_gradient(weight: torch.Tensor, l1: float, l2: float) -> torch.Tensor:
    """Gradient of the penalty at `weight`, of its shape and dtype: `l1 * sign(w) + l2 * w`; at 0 the subgradient of |w| is 0."""
    return l1 * torch.sign(weight) + l2 * weight
