"""Batches whose sources follow their running losses: what closes the circle from the loss back to the sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from largeformer.data.loader import SourceBatches
from largeformer.data.sampling import LossWeighted
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


class Follower:
    """Hands an order the losses of each step by source, as the output layer of the last pipeline stage saw them."""

    def __init__(self, order: LossWeighted, chunks: Sequence[Any], groups: ParallelGroups) -> None:
        self.order = order
        self._groups = groups
        self._head = chunks[-1].output_layer if groups.is_last_stage else None
        self._expected: Sequence[Batch] | None = None

    def expect(self, batches: Sequence[Batch]) -> None:
        """The next step trains on `batches`."""
        self._expected = batches
        if self._head is not None:
            self._head.row_losses = []

    def observe(self) -> None:
        """Tell the order about the step that was expected, if there is one. Collective."""
        if self._expected is not None:
            self.order.observe(self._by_source(self._expected))
            self._expected = None

    def state_dict(self) -> dict[str, Any]:
        """Collective, after a step."""
        self.observe()
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order.load_state_dict(state)

    def _by_source(self, batches: Sequence[Batch]) -> np.ndarray:
        """float64[sources]: the mean loss per valid token over the global batch, NaN where a source gave none; alike on every rank."""
        totals = torch.zeros(2, len(self.order.shares), dtype=torch.float64)
        if self._head is not None:
            rows, self._head.row_losses = self._head.row_losses, None
            for batch, losses in zip(batches, rows, strict=True):
                assert batch.source_ids is not None
                totals[0].index_add_(0, batch.source_ids, losses.double().cpu())
                totals[1].index_add_(0, batch.source_ids, batch.loss_mask.sum(dim=1, dtype=torch.float64))
        on_device = totals.to(torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(on_device, group=self._groups.data)
        self._groups.from_last_stage(on_device)
        dist.broadcast(on_device, src=0)  # tensor-parallel ranks may have rounded differently, and must draw alike
        sums, tokens = on_device.cpu().numpy()
        return np.divide(sums, tokens, out=np.full(len(tokens), np.nan), where=tokens > 0)  # type: ignore[no-any-return]


class FollowedBatches:
    """A `BatchSource` whose order knows each step's losses before the next batch is handed out."""

    def __init__(self, batches: SourceBatches, follower: Follower) -> None:
        self._batches, self._follower = batches, follower

    @property
    def consumed_samples(self) -> int:
        return self._batches.consumed_samples

    def next(self) -> list[Batch]:
        self._follower.observe()
        batches = self._batches.next()
        self._follower.expect(batches)
        return batches
