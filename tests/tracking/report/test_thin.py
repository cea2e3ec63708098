"""Fewer points, no peak lost: against the definition, over many curves."""

from __future__ import annotations

import random

import pytest

from largeformer.tracking.report.thin import thin


def curve(length: int) -> list[tuple[int, float]]:
    draw = random.Random(length)
    return [(step, draw.gauss(0, 1)) for step in range(1, length + 1)]


@pytest.mark.parametrize("length", [0, 1, 2, 19, 20, 21, 22, 999, 10_000])
def test_extremes_ends_and_order_are_kept(length: int) -> None:
    points = curve(length)
    thinned = thin(points, 10)
    assert len(thinned.points) <= 22 and {*thinned.points} <= {*points}
    assert [*thinned.points] == sorted({*thinned.points})
    if points:
        assert (thinned.points[0], thinned.points[-1]) == (points[0], points[-1])
        for extreme in (min, max):
            assert extreme(value for _, value in thinned.points) == extreme(value for _, value in points)


def test_every_single_spike_survives() -> None:
    flat = [(step, 1.0) for step in range(1, 1001)]
    for at in range(1000):
        spiked = [*flat[:at], (at + 1, 50.0), *flat[at + 1 :]]
        assert (at + 1, 50.0) in thin(spiked, 20).points


def test_means_stand_for_all_points() -> None:
    points = curve(1000)
    thinned = thin(points, 10)
    assert thinned.means is not None
    assert sum(mean for _, mean in thinned.means) / 10 == pytest.approx(sum(value for _, value in points) / 1000)
    assert thin(points[:20], 10).means is None
