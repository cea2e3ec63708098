"""What the end of a document does to a batch, against Megatron-core's own function and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from largeformer.data.packing import Packing
from largeformer.parallel.batch import Batch

EOD, VOCAB = 2, 9


def packed(rows: list[list[int]], **switches: bool) -> Batch:
    ids = np.array(rows, dtype=np.int64)
    return Packing(EOD, **switches).batch(ids[:, :-1], ids[:, 1:], np.ones((ids.shape[0], ids.shape[1] - 1), dtype=np.float32))


def test_by_hand() -> None:
    """The end belongs to what it ends; two ends in a row are an empty document between."""
    batch = packed([[5, 6, EOD, 7, 8, EOD, EOD, 3, 4]], reset_attention_mask=True, reset_position_ids=True, eod_mask_loss=True)
    assert batch.segment_ids is not None
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 1, 1, 0, 0, 1]]
    mask = batch.attention_mask()
    assert mask is not None and mask.shape == (1, 1, 8, 8)
    seen = [[k for k in range(8) if not mask[0, 0, q, k]] for q in range(8)]
    assert seen == [[0], [0, 1], [0, 1, 2], [3], [3, 4], [3, 4, 5], [6], [7]]


def test_without_a_switch_nothing_is_made() -> None:
    batch = packed([[5, EOD, 6, 7, 8]])
    assert batch.segment_ids is None and batch.attention_mask() is None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] and batch.loss_mask.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_equals_megatrons_masks(attention: bool, positions: bool, loss: bool) -> None:
    rows = np.random.default_rng(0).integers(0, VOCAB, (40, 33))
    rows[0] = EOD
    rows[1] = 5
    switches = {"reset_attention_mask": attention, "reset_position_ids": positions, "eod_mask_loss": loss}
    batch = packed(rows.tolist(), **switches)
    mask = batch.attention_mask()
    for row in range(len(rows)):
        tokens = torch.from_numpy(rows[row, :-1])
        their_mask, their_loss_mask, their_positions = _get_ltor_masks_and_position_ids(tokens, EOD, positions, attention, loss, True)
        if attention:
            assert mask is not None and torch.equal(mask[row], their_mask)
        assert torch.equal(batch.loss_mask[row], their_loss_mask)
        assert torch.equal(batch.position_ids[row], their_positions)


def test_a_batch_moves_with_all_its_tensors() -> None:
    ids = np.full((1, 4), 5)
    batch = Packing(EOD, True, True).batch(ids, ids, np.ones((1, 4), dtype=np.float32), (7,), np.array([1]))
    moved = batch.to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6 and all(tensor.is_meta for tensor in tensors) and moved.sample_ids == (7,)
