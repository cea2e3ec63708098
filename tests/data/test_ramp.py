"""Batch-size ramp-up against Megatron-core's own calculator, and against counting."""

from __future__ import annotations

import pytest

from largeformer.data.ramp import BatchSizes
from tests.recipes import tiny_recipe

RAMPS = {
    "one increment": (8, 8, 100),
    "several": (4, 4, 400),
    "not a whole number of samples an increment": (4, 2, 97),
    "already there": (16, 4, 100),
}


def sizes(start: int, increment: int, samples: int) -> BatchSizes:
    ramp = {"start": start, "increment": increment, "samples": samples}
    return BatchSizes(tiny_recipe(train={"micro_batch_size": 1, "global_batch_size": 16, "rampup_batch_size": ramp}).train)


@pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
def test_sizes_are_those_of_megatron(ramp: tuple[int, int, int]) -> None:
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    ours, start = sizes(*ramp), ramp[0]
    if start == 16:
        assert {ours.at(consumed) for consumed in range(200)} == {16}
        return
    theirs = RampupBatchsizeNumMicroBatchesCalculator(16, 1, 1, False, 1, *ramp)
    for consumed in range(ramp[2] + 40):
        theirs.update(consumed, consistency_check=False, verbose=False)
        assert ours.at(consumed) == theirs.get_current_running_global_batch_size(), consumed


@pytest.mark.parametrize("ramp", RAMPS.values(), ids=RAMPS)
def test_samples_are_those_of_the_batches_in_turn(ramp: tuple[int, int, int]) -> None:
    ours, consumed = sizes(*ramp), 0
    for iterations in range(60):
        assert ours.samples_after(iterations) == consumed
        consumed += ours.at(consumed)


def test_without_a_ramp_the_size_is_constant() -> None:
    constant = BatchSizes(tiny_recipe(train={"global_batch_size": 12}).train)
    assert {constant.at(consumed) for consumed in (0, 1, 10_000)} == {12}
    assert constant.samples_after(7) == 84
