"""One micro batch, as the loader makes it and the model takes it. `b` micro batch, `s` sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """tokens, labels, position_ids: int64[b, s]; loss_mask: float32[b, s], 1 where the label counts; sample_ids: the
    position of each row in the shuffled training order, which identifies it whatever the layout."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: tuple[int, ...] = ()

    def to(self, device: torch.device) -> Batch:
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "loss_mask", "position_ids")}
        return replace(self, **moved)
