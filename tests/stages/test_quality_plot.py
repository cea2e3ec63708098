"""The picture of size against quality: every name is read, beside its point, and the numbers on the axes are round."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from largeformer.stages.quality_plot import HEIGHT, LETTER, LINE, WIDTH, logarithmic_ticks, plot, round_ticks

# Of a real chain: two pairs share a place, and three more are close together at the lower edge.
CHAIN = [
    ("pretrain", 23_081_472, 19.695),
    ("prune", 19_542_528, 20.445),
    ("distill", 19_542_528, 19.056),
    ("quantize", 12_000_000, 19.077),
    ("export/hf", 19_542_528, 19.056),
    ("export/hf-int8", 12_000_000, 19.077),
    ("export/onnx/model", 39_700_000, 19.056),
    ("export/onnx/model_int8", 10_500_000, 19.175),
]
PICTURES = {
    "a chain": CHAIN,
    "alike": [(f"export/number-{i}", 10**7, 20.0) for i in range(8)],
    "a crowd": [("far", 3 * 10**7, 60.0), *((f"export/number-{i}", 10**7 + 10**5 * (i % 4), 20.0 + 0.3 * i) for i in range(16))],
    "alone": CHAIN[:1],
    "one megabyte": [("one", 10**6, 1.0), ("two", 10**6 + 3, 1.0)],
    "nearly alike": [("one", 10**7, 497.373101), ("two", 10**7 + 3, 497.373404)],
    "large and near": [("one", 10**7, 1.23456e6), ("two", 2 * 10**7, 1.23457e6 * 1.0003)],
    "long names": [("one", 10**7, 20.0), ("export-of-the-distilled-model/onnx/model_int8", 3 * 10**7, 20.5)],
    "far apart": [("one", 10**4, 3.0), ("two", 10**12, 5.0e6)],
}
Box = tuple[float, float, float, float]


def drawn(points: list[tuple[str, int, float]]) -> tuple[dict[str, Box], list[Box]]:
    """The boxes of all texts, a letter at its widest, and of all dots."""
    tree = ElementTree.fromstring(plot(points))
    texts = {}
    for text in tree.iter("{http://www.w3.org/2000/svg}text"):
        assert text.text is not None
        x, y, width = float(text.attrib["x"]), float(text.attrib["y"]), LETTER * len(text.text)
        left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.attrib["text-anchor"]]
        name = text.text if text.attrib["text-anchor"] == "start" else f"{text.text} ({text.attrib['text-anchor']})"  # a number of one axis
        assert name not in texts, "each is told from the others"
        texts[name] = (left, y + 3 - LINE, left + width, y + 3)
    dots = []
    for dot in tree.iter("{http://www.w3.org/2000/svg}circle"):
        x, y, r = (float(dot.attrib[key]) for key in ("cx", "cy", "r"))
        dots.append((x - r, y - r, x + r, y + r))
    return texts, dots


def overlap(one: Box, other: Box) -> bool:
    room = 0.11  # the picture has one digit behind the point
    return one[0] < other[2] - room and other[0] < one[2] - room and one[1] < other[3] - room and other[1] < one[3] - room


@pytest.mark.parametrize("name", PICTURES)
def test_no_name_covers_anything(name: str) -> None:
    texts, dots = drawn(PICTURES[name])
    names = {point[0] for point in PICTURES[name]}
    assert names <= texts.keys() and len(dots) == len(PICTURES[name])
    for one, other in itertools.combinations(texts, 2):
        assert not overlap(texts[one], texts[other]), (one, other)
    for label, (left, top, right, bottom) in texts.items():
        assert left >= 0 and top >= 0 and right <= WIDTH and bottom <= HEIGHT, label
        assert label not in names or not any(overlap((left, top, right, bottom), dot) for dot in dots), label


def test_a_name_is_beside_its_point() -> None:
    texts, dots = drawn(CHAIN)
    for (name, _, _), (_, top, right, bottom) in zip(CHAIN, dots, strict=True):
        assert 0 < texts[name][0] - right < 8 and abs(sum(texts[name][1::2]) / 2 - (top + bottom) / 2) <= LINE, name


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (18.95, 20.56, [19, 19.5, 20, 20.5]),
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (19.9999, 20.0121, [20, 20.002, 20.004, 20.006, 20.008, 20.01, 20.012]),
        (-3.0, 41.0, [0, 10, 20, 30, 40]),
    ],
)
def test_round_ticks(low: float, high: float, expected: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (9.45, 44.1, [10, 15, 20, 30, 40]),
        (0.9, 130.0, [1, 2, 5, 10, 20, 50, 100]),
        (0.02, 30000.0, [0.1, 1, 10, 100, 1000, 10000]),
        (10.5, 11.4, [10.6, 10.8, 11, 11.2, 11.4]),
    ],
)
def test_logarithmic_ticks(low: float, high: float, expected: list[float]) -> None:
    assert logarithmic_ticks(low, high) == pytest.approx(expected)


def test_without_a_model_there_are_only_the_names_of_the_axes() -> None:
    texts, dots = drawn([])
    assert len(texts) == 2 and dots == []
