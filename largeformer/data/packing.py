"""Several documents in one sample: who sees whom, where positions begin, what counts. `b` micro batch, `s` sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from largeformer.config.data import DataConfig
from largeformer.parallel.batch import Batch


@dataclass(frozen=True)
class Packing:
    """What the end of a document, the id `eod`, does to a batch: Megatron's three switches. An end belongs to what it ends."""

    eod: int = -1
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @classmethod
    def of(cls, data: DataConfig, eod: int) -> Packing:
        return cls(eod, data.reset_attention_mask, data.reset_position_ids, data.eod_mask_loss)

    def batch(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        loss_mask: np.ndarray,
        sample_ids: tuple[int, ...] = (),
        source_ids: np.ndarray | None = None,
    ) -> Batch:
        """tokens, labels: int64[b, s]; loss_mask: float32[b, s]. Only numbers linear in s are made here; see `Batch.attention_mask`."""
        segments = segment_ids(tokens, self.eod) if self.reset_attention_mask or self.reset_position_ids else None
        if segments is not None and self.reset_position_ids:
            positions = restarting_positions(segments)
        else:
            positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
        if self.eod_mask_loss:
            loss_mask = loss_mask * (tokens != self.eod)
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(loss_mask.astype(np.float32, copy=False)),
            torch.from_numpy(positions),
            sample_ids,
            torch.from_numpy(segments) if segments is not None and self.reset_attention_mask else None,
            torch.from_numpy(source_ids) if source_ids is not None else None,
        )


def segment_ids(tokens: np.ndarray, eod: int) -> np.ndarray:
    """int32[b, s]: how many documents ended before each token."""
    ends = np.cumsum(tokens == eod, axis=1, dtype=np.int32)
    ends[:, 1:] = ends[:, :-1]
    ends[:, 0] = 0
    return ends


def restarting_positions(segments: np.ndarray) -> np.ndarray:
    """int64[b, s]: how far each token is from the first of its segment."""
    places = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    begins = np.zeros(segments.shape, dtype=np.int64)
    begins[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], places[:, 1:], 0)
    return places - np.maximum.accumulate(begins, axis=1)
