"""Fewer points of a curve, none of its peaks lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[int, float]]
_DIGITS = 7


@dataclass(frozen=True)
class Curve:
    """Points (step, value) as they are drawn. `means` (step, mean) stand for them in smoothing; None where `points` are all there were."""

    points: Points
    means: Points | None = None

    def as_json(self) -> dict[str, Any]:
        raw = {"x": [step for step, _ in self.points], "y": [_rounded(value) for _, value in self.points]}
        if self.means is None:
            return raw
        return {**raw, "mx": [step for step, _ in self.means], "my": [_rounded(value) for _, value in self.means]}


def thin(points: Points, buckets: int) -> Curve:
    """At most two points of each of `buckets` equal parts, its lowest and its highest in their order, and the parts' means.

    A spike of a single step is the highest of its part, whatever the length of the run. First and last point are kept.
    """
    if len(points) <= 2 * buckets:
        return Curve(points)
    drawn: list[tuple[int, float]] = [points[0]]
    means: list[tuple[int, float]] = []
    for number in range(buckets):
        part = points[number * len(points) // buckets : (number + 1) * len(points) // buckets]
        low, high = (pick(range(len(part)), key=lambda i: part[i][1]) for pick in (min, max))
        drawn += [part[i] for i in sorted({low, high}) if part[i][0] != drawn[-1][0]]
        means.append((part[len(part) // 2][0], sum(value for _, value in part) / len(part)))
    return Curve(drawn if drawn[-1] == points[-1] else [*drawn, points[-1]], means)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
