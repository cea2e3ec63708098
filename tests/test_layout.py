"""Rank arithmetic against Megatron-core's own, and the divisibility rules against what they promise."""

from __future__ import annotations

from itertools import product

import pytest

from largeformer.layout import Coordinates, Layout, batch_problems, padded_vocab_size, shape_problems, stage_layers

LAYOUTS = [Layout(world_size=t * p * d, tensor=t, pipeline=p) for t, p, d in product((1, 2, 3, 4), (1, 2, 4), (1, 2, 3))]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda at: f"tp{at.tensor}pp{at.pipeline}dp{at.data}")
def test_groups_are_megatrons(layout: Layout) -> None:
    """The ranks that share all coordinates but one are the groups that Megatron-core makes in its default order."""
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=1, order="tp-cp-ep-dp-pp")
    at = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len(set(at)) == layout.world_size, "no two ranks stand in one place"
    for axis, varies in {"tp": ("tensor",), "dp": ("data",), "pp": ("pipeline",), "tp-pp": ("tensor", "pipeline")}.items():
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(at):
            fixed = tuple(getattr(place, name) for name in ("tensor", "data", "pipeline") if name not in varies)
            groups.setdefault(fixed, []).append(rank)
        assert sorted(groups.values()) == sorted(map(list, generator.get_ranks(axis))), axis


def test_order_within_a_group_is_the_coordinate() -> None:
    layout = Layout(world_size=24, tensor=2, pipeline=3)
    assert layout.coordinates(0) == Coordinates(tensor=0, data=0, pipeline=0)
    assert layout.coordinates(1) == Coordinates(tensor=1, data=0, pipeline=0)
    assert layout.coordinates(2) == Coordinates(tensor=0, data=1, pipeline=0)
    assert layout.coordinates(8) == Coordinates(tensor=0, data=0, pipeline=1)
    assert layout.coordinates(23) == Coordinates(tensor=1, data=3, pipeline=2)


@pytest.mark.parametrize("world_size", [0, -4, 1, 3, 6])
def test_world_that_does_not_fit(world_size: int) -> None:
    with pytest.raises(ValueError, match=f"world size {world_size} does not fit: .* = 4 must divide it; start a multiple of 4"):
        Layout(world_size=world_size, tensor=2, pipeline=2)


@pytest.mark.parametrize(("size", "divisible_by", "tensor", "rows"), [(50257, 128, 1, 50304), (50257, 128, 8, 51200), (4096, 128, 2, 4096)])
def test_padded_vocabulary(size: int, divisible_by: int, tensor: int, rows: int) -> None:
    assert padded_vocab_size(size, divisible_by, tensor) == rows


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 2), (2, 6), (4, 3), (3, 4)])
def test_every_layer_is_held_once(pipeline: int, virtual: int) -> None:
    """Going through the chunks in the order of the computation (chunk by chunk, stage by stage) meets the layers in turn."""
    stages = stage_layers(24, pipeline, virtual)
    assert [len(chunks) for chunks in stages] == [virtual] * pipeline
    assert [layer for chunk in range(virtual) for stage in stages for layer in stage[chunk]] == list(range(24))


@pytest.mark.parametrize(
    ("pipeline", "first", "last", "counts"),
    [(3, 2, None, [2, 5, 5]), (3, None, 4, [4, 4, 4]), (3, 3, 1, [3, 8, 1]), (2, 5, None, [5, 7]), (2, 5, 7, [5, 7])],
)
def test_uneven_stages(pipeline: int, first: int | None, last: int | None, counts: list[int]) -> None:
    stages = stage_layers(12, pipeline, first=first, last=last)
    assert [len(chunk) for (chunk,) in stages] == counts
    assert [layer for (chunk,) in stages for layer in chunk] == list(range(12))


def test_shape_rules_are_the_arithmetic_they_claim() -> None:
    """No problem is found exactly where every share is whole, over a grid of shapes and degrees."""
    for heads, groups, layers, tensor, pipeline, virtual in product((4, 6), (1, 2, 4), (4, 6), (1, 2, 3), (1, 2), (1, 2)):
        problems = shape_problems(
            num_layers=layers,
            heads=heads,
            query_groups=groups,
            ffn=12,
            seq_length=36,
            tensor=tensor,
            pipeline=pipeline,
            virtual=virtual,
            sequence_parallel=False,
        )
        whole = heads % tensor == groups % tensor == heads % groups == layers % (pipeline * virtual) == 0
        assert (not problems) == (whole and (virtual == 1 or pipeline > 1)), (heads, groups, layers, tensor, pipeline, virtual)


def test_batch_rules() -> None:
    """Over a grid: a batch fits exactly where it is micro batches of whole rounds, and whole pipelines when interleaved."""
    for batch, micro, data, virtual in product(range(1, 25), (1, 2), (1, 3), (1, 2)):
        problems = batch_problems(batch, micro, Layout(world_size=2 * data, pipeline=2, virtual=virtual))
        rounds, rest = divmod(batch, micro * data)
        assert (not problems) == (rest == 0 and (virtual == 1 or rounds % 2 == 0)), (batch, micro, data, virtual)


def test_the_batch_that_is_proposed_fits() -> None:
    (problem,) = batch_problems(100, 4, Layout(world_size=16))
    assert problem.endswith("= 64; the nearest that fits is 128")
    (problem,) = batch_problems(12, 4, Layout(world_size=2, pipeline=2, virtual=2))
    assert problem.endswith("such as a batch of 16")
