"""A simulated pipeline against the published formulas of its bubble, and against time worked out by hand."""

from __future__ import annotations

import random

import pytest

from largeformer.planning.schedule import op_order
from largeformer.planning.simulate import simulate


def alike(pipeline: int, virtual: int, seconds: float) -> list[list[float]]:
    return [[seconds / virtual] * virtual for _ in range(pipeline)]


@pytest.mark.parametrize(("pipeline", "microbatches"), [(1, 3), (2, 2), (2, 64), (4, 8), (8, 8), (8, 256), (64, 512)])
def test_bubble_of_one_forward_one_backward(pipeline: int, microbatches: int) -> None:
    """(p - 1) / m (Narayanan et al. 2021, arXiv:2104.04473, section 2.2)."""
    timeline = simulate(alike(pipeline, 1, 1.0), alike(pipeline, 1, 2.0), microbatches)
    assert timeline.bubble == pytest.approx((pipeline - 1) / microbatches, rel=0.01)


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), [(2, 2, 2), (4, 2, 8), (4, 5, 32), (8, 3, 64), (16, 4, 64)])
def test_bubble_of_interleaving(pipeline: int, virtual: int, microbatches: int) -> None:
    """(p - 1) / (v m), the same section."""
    timeline = simulate(alike(pipeline, virtual, 1.0), alike(pipeline, virtual, 2.0), microbatches)
    assert timeline.bubble == pytest.approx((pipeline - 1) / (virtual * microbatches), rel=0.01)


def test_sixteen_thousand_ranks() -> None:
    """Tensor 8 x data 16 x pipeline 128: every copy of the pipeline and every tensor rank does the same."""
    timeline = simulate(alike(128, 1, 1.0), alike(128, 1, 2.0), 256)
    assert len(timeline.busy) * 8 * 16 == 16_384
    assert timeline.bubble == pytest.approx(127 / 256, rel=0.01)


def test_two_stages_by_hand() -> None:
    """Stage 1 takes twice as long: F0 at 0-1 and 1-3, B0 at 3-7 and 7-9; then F1 and B1 until 13, and B1 on stage 0 ends it."""
    timeline = simulate([[1.0], [2.0]], [[2.0], [4.0]], microbatches=2)
    assert timeline.seconds == 1 + 2 * (2 + 4) + 2
    assert timeline.busy == (6.0, 12.0)
    assert timeline.bubble == pytest.approx(3 / 12)


def test_transfer_is_waited_for() -> None:
    assert simulate([[1.0], [1.0]], [[1.0], [1.0]], microbatches=1, transfer=0.5).seconds == 5.0


@pytest.mark.parametrize("seed", range(6))
def test_unequal_stages_against_a_longest_path(seed: int) -> None:
    """The end of a schedule is the longest path through its operations: each waits for its input and for the one before on its stage."""
    choice = random.Random(seed)
    pipeline, virtual = choice.choice([(2, 1), (3, 1), (5, 1), (2, 2), (3, 2), (2, 4)])
    microbatches = pipeline * choice.randint(1, 3)
    forward = [[choice.randint(1, 9) for _ in range(virtual)] for _ in range(pipeline)]
    backward = [[choice.randint(1, 9) for _ in range(virtual)] for _ in range(pipeline)]
    assert simulate(forward, backward, microbatches).seconds == longest_path(forward, backward, microbatches)


def longest_path(forward: list[list[int]], backward: list[list[int]], microbatches: int) -> int:
    """By relaxing every constraint until nothing moves."""
    pipeline, virtual = len(forward), len(forward[0])
    last = pipeline * virtual - 1
    ends: dict[tuple[bool, int, int], int] = {}
    orders = [
        [(back, micro, chunk * pipeline + stage) for back, micro, chunk in op_order(stage, pipeline, virtual, microbatches)]
        for stage in range(pipeline)
    ]
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            clock = 0
            for back, micro, place in order:
                source = (True, micro, place + 1) if back and place < last else (False, micro, place if back else place - 1)
                ready = ends.get(source, 0) if back or place else 0
                clock = max(clock, ready) + (backward if back else forward)[stage][place // pipeline]
                if ends.get((back, micro, place)) != clock:
                    ends[back, micro, place], moved = clock, True
    return max(ends.values())
