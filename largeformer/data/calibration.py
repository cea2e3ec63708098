"""Text for calibration: whole windows, spread evenly over what there is. `s` sequence, `b` micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from largeformer.data.loader import Reading
from largeformer.errors import BadInputError
from largeformer.parallel.batch import Batch


def calibration_batches(streams: Sequence[np.ndarray], seq_length: int, samples: int, reading: Reading) -> list[Batch]:
    """This data rank's part of `samples` windows of s ids, int64[b, s], or of as many as the streams hold without overlap.

    Windows are whole: none is padded. Documents are told apart in them as in training; each of their ids counts. The same windows at any
    layout. Raises BadInputError where there is not one window for each data rank.
    """
    starts = [(stream, start) for stream in streams for start in range(0, len(stream) - seq_length, seq_length)]
    if samples < reading.data_size:
        raise BadInputError(
            f"calibration.samples {samples} is fewer than the {reading.data_size} data-parallel ranks, of which each reads one at least: "
            f"set it to {reading.data_size} or more"
        )
    count = min(samples, len(starts))
    if count < reading.data_size:
        ids = sum(map(len, streams))
        raise BadInputError(
            f"the calibration text has {ids:,} tokens, {len(starts)} windows of {seq_length}, and {reading.data_size} are needed: name "
            "a longer text as calibration.text"
        )
    chosen = [starts[i * len(starts) // count] for i in range(count)][reading.data_rank :: reading.data_size]
    rows = [np.asarray(stream[start : start + seq_length + 1], dtype=np.int64) for stream, start in chosen]
    stacked = [np.stack(rows[first : first + reading.micro_batch_size]) for first in range(0, len(rows), reading.micro_batch_size)]
    whole = replace(reading.packing, eod_mask_loss=False)
    return [whole.batch(ids[:, :-1].copy(), ids[:, 1:].copy(), np.ones((len(ids), seq_length))) for ids in stacked]
