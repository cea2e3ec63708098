"""Windows of calibration text: whole, spread evenly, documents told apart as training does."""

from __future__ import annotations

import numpy as np
import pytest

from largeformer.data.calibration import calibration_batches
from largeformer.data.loader import Reading
from largeformer.data.packing import Packing
from largeformer.errors import BadInputError

EOD = 0
STREAM = np.array([5, 6, EOD, 7, 8, 9, EOD, 4, 3, 2, 1, 5, 6], dtype=np.uint16)


def test_windows_are_spread_and_dealt_to_ranks() -> None:
    stream = np.arange(100, dtype=np.uint16)
    firsts = [
        [batch.tokens[:, 0].tolist() for batch in calibration_batches([stream, stream], 10, 6, Reading(2, rank, 2))] for rank in range(2)
    ]
    assert firsts == [[[0, 60], [30]], [[30, 0], [60]]]
    (whole, *_) = calibration_batches([stream], 10, 1, Reading(1))
    assert whole.tokens.tolist() == [list(range(10))] and whole.labels.tolist() == [list(range(1, 11))]


@pytest.mark.parametrize("apart", [False, True])
def test_documents_are_told_apart_as_in_training(apart: bool) -> None:
    packing = Packing(EOD, reset_attention_mask=apart, reset_position_ids=apart, eod_mask_loss=apart)
    (batch,) = calibration_batches([STREAM], 6, 2, Reading(2, packing=packing))
    assert batch.tokens.tolist() == [[5, 6, 0, 7, 8, 9], [0, 4, 3, 2, 1, 5]]
    assert batch.loss_mask.tolist() == [[1.0] * 6] * 2
    assert batch.position_ids.tolist() == ([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]] if apart else [list(range(6))] * 2)
    assert (batch.attention_mask() is not None) == apart


def test_too_little_text_is_refused() -> None:
    with pytest.raises(BadInputError, match="has 13 tokens, 1 windows of 12, and 2 are needed"):
        calibration_batches([STREAM], 12, 8, Reading(1, 0, 2))


def test_fewer_windows_than_ranks_are_another_fault() -> None:
    with pytest.raises(BadInputError, match="samples 3 is fewer than the 4 data-parallel ranks"):
        calibration_batches([STREAM], 2, 3, Reading(1, 0, 4))
