"""A picture of size against quality, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 90, 180, 34, 56
LINE, LETTER, DOT = 14, 7, 5  # pixels of a line of text, of a letter at most, of a point's radius
TICKS = range(3, 9)
Box = tuple[float, float, float, float]  # left, top, right, bottom


def plot(points: Sequence[tuple[str, int, float]]) -> str:
    """points: name, bytes and perplexity of each model. Sizes are on a logarithmic scale; lower left is better."""
    drawn = [
        _text(LEFT, HEIGHT - 12, "size of the weights [MB], logarithmic; lower left is better"),
        _text(8, 18, "perplexity on held-out text"),
    ]
    if points:
        sizes, perplexities = [size / 1e6 for _, size, _ in points], [perplexity for *_, perplexity in points]
        across = _Scale([math.log10(size) for size in sizes], LEFT, WIDTH - RIGHT)
        up = _Scale(perplexities, HEIGHT - BOTTOM, TOP)
        places = [(across(math.log10(size)), up(perplexity)) for size, perplexity in zip(sizes, perplexities, strict=True)]
        drawn += _grid(across, up)
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" fill="#3465a4"/>' for x, y in places]
        drawn += _labels([(x, y, name) for (x, y), (name, _, _) in zip(places, points, strict=True)])
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Scale:
    """From values to pixels, with a little room around; more where they are so near to each other that six figures hardly tell them
    apart."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        span, size = max(values) - min(values), max(abs(values[0]), 1.0)
        room = 0.08 * span if span > 1e-4 * size else 0.05 * size
        self.low, self.high, self._start, self._end = min(values) - room, max(values) + room, start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def _grid(across: _Scale, up: _Scale) -> Iterator[str]:
    for value in round_ticks(up.low, up.high):
        y = up(value)
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
        yield _text(LEFT - 6, y + 4, f"{value:.6g}", anchor="end")
    for value in logarithmic_ticks(10**across.low, 10**across.high):
        x = across(math.log10(value))
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>'
        yield _text(x, HEIGHT - BOTTOM + 16, f"{value:.6g}", anchor="middle")


def round_ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in [low, high], about six."""
    smallest = 10.0 ** math.floor(math.log10((high - low) / TICKS[-1]))
    step = next(step for step in (smallest * factor for factor in (1, 2, 5, 10)) if (high - low) / step <= TICKS[-1])
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def logarithmic_ticks(low: float, high: float) -> list[float]:
    """Numbers of one figure, or 1.5, times powers of ten in [low, high], as many as there is room for; multiples of one where these are too
    few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        found = [value for power in powers for value in (factor * 10.0**power for factor in factors) if low <= value <= high]
        if len(found) in TICKS:
            return found
    return found if len(found) > TICKS[-1] else round_ticks(low, high)


def _labels(points: Sequence[tuple[float, float, str]]) -> Iterator[str]:
    """A point's name right of it, or left where the picture would end, one below another where points share a place, moved up or down where
    another name or point is."""
    taken: list[Box] = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y, _ in points]
    for x, y, names in _by_place(points):
        size = LETTER * max(map(len, names)), LINE * len(names)
        left = x + DOT + 4 if x + DOT + 4 + size[0] <= WIDTH else max(x - DOT - 4 - size[0], 0)
        box = _free_place(left, y, size, taken)
        taken.append(box)
        for line, name in enumerate(names):
            yield _text(box[0], box[1] + LINE * (line + 1) - 3, name)


def _by_place(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, list[str]]]:
    """Points whose dots cover each other, as one."""
    places: list[tuple[float, float, list[str]]] = []
    for x, y, name in sorted(points, key=lambda point: round(point[1])):
        there = next((names for left, top, names in places if abs(left - x) < DOT and abs(top - y) < DOT), None)
        if there is None:
            places.append((x, y, [name]))
        else:
            there.append(name)
    return places


def _free_place(left: float, middle: float, size: tuple[float, float], taken: Sequence[Box]) -> Box:
    """The nearest box of this size above or below that covers nothing; the nearest of all where there is no room."""
    tops = [middle - size[1] / 2 + sign * 2 * step for step in range(HEIGHT // 2) for sign in (1, -1)]
    boxes = [(left, top, left + size[0], top + size[1]) for top in tops if top >= TOP - LINE and top + size[1] <= HEIGHT - BOTTOM]
    return next((box for box in boxes if not any(_overlap(box, other) for other in taken)), boxes[0] if boxes else (left, TOP, *size))


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'
