"""Batch-size ramp-up against the steps written out, and against Megatron-core's own calculator."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from largeformer.config.schema import TrainConfig
from largeformer.data.ramp import BatchSizes


def sizes(final: int, ramp: dict[str, int] | None) -> BatchSizes:
    return BatchSizes(TrainConfig(micro_batch_size=1, global_batch_size=final, train_iters=1, rampup_batch_size=ramp))  # type: ignore[arg-type]


def batches(sizes: BatchSizes, count: int) -> list[int]:
    """The first `count` global batch sizes of a run."""
    made: list[int] = []
    for _ in range(count):
        made.append(sizes.at(sum(made)))
    return made


# Final size, ramp-up, and the first batches that follow.
CASES: dict[str, tuple[int, dict[str, int] | None, list[int]]] = {
    "no ramp-up": (8, None, [8, 8, 8]),
    "three steps of 24 samples": (16, {"start": 4, "increment": 4, "samples": 72}, [4] * 6 + [8] * 3 + [12] * 2 + [16, 16]),
    "a step ends within a batch": (6, {"start": 2, "increment": 2, "samples": 10}, [2, 2, 2, 4, 6, 6]),
    "one step": (8, {"start": 4, "increment": 4, "samples": 10}, [4, 4, 4, 8, 8]),
    "starts at the end": (8, {"start": 8, "increment": 4, "samples": 100}, [8, 8]),
    "over at once": (8, {"start": 2, "increment": 2, "samples": 1}, [2, 8, 8]),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_by_hand(name: str) -> None:
    final, ramp, expected = CASES[name]
    assert batches(sizes(final, ramp), len(expected)) == expected


@pytest.mark.parametrize("name", CASES)
def test_samples_after_are_the_sum(name: str) -> None:
    final, ramp, _ = CASES[name]
    ours = sizes(final, ramp)
    for iterations in (0, 1, 3, 7, 20):
        assert ours.samples_after(iterations) == sum(batches(ours, iterations))


@pytest.mark.parametrize(("final", "start", "increment", "samples"), [(64, 8, 8, 1000), (48, 16, 4, 333), (10, 2, 4, 77), (32, 8, 24, 50)])
def test_agrees_with_megatrons_calculator(final: int, start: int, increment: int, samples: int) -> None:
    theirs: Any = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=final,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=1,
        start_global_batch_size=start,
        batch_size_increment=increment,
        ramup_samples=samples,
    )
    ours = sizes(final, {"start": start, "increment": increment, "samples": samples})
    for consumed in range(2 * samples):
        theirs.update(consumed, consistency_check=False)
        assert ours.at(consumed) == theirs.get_current_global_batch_size(), f"after {consumed} samples"
