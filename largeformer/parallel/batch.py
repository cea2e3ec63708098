"""One micro batch, as the loader makes it and the model takes it. `b` micro batch, `s` sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Batch:
    """tokens, labels, position_ids: int64[b, s]; loss_mask: float32[b, s], 1 where the label counts; sample_ids: the
    position of each row in the training order, which identifies it whatever the layout; segment_ids: int32[b, s], the number of
    the document that a token belongs to, where documents must not see each other; source_ids: int64[b], where rows came from."""

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    sample_ids: tuple[int, ...] = ()
    segment_ids: torch.Tensor | None = None
    source_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Page-locked, so that the copy to a GPU runs beside its work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def attention_mask(self) -> torch.Tensor | None:
        """bool[b, 1, s, s], True where a query must not look: at later tokens, and at other documents. None where causal order is all.

        Made on the batch's device, from b x s numbers: it is quadratic, and the loader should not carry it.
        """
        if self.segment_ids is None:
            return None
        length = self.segment_ids.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=self.segment_ids.device).triu_(1)
        return ((self.segment_ids[:, :, None] != self.segment_ids[:, None, :]) | later)[:, None]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), torch.Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]
