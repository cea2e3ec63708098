"""The walk over layers sees what the model itself computes, alike at every layout, and passes on what was changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from largeformer.compression.layerwise import walk, watching
from largeformer.compression.linears import Linear, linears
from largeformer.config.schema import Recipe
from largeformer.parallel.groups import ParallelGroups
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.one_process import relative_difference
from tests.recipes import GPT2, LLAMA, tiny_recipe

ROWS = 4
LAYOUTS = {"one rank": (1, 1), "TP2": (2, 2), "DP2": (2, 1)}


class Moments:
    """Sum, and sum of squares, over tokens."""

    def __init__(self, linear: Linear) -> None:
        self.sums = torch.zeros(2, linear.shape[1], dtype=torch.float64)

    def update(self, inputs: torch.Tensor) -> None:
        self.sums += torch.stack([inputs.double().sum(0), inputs.double().square().sum(0)])

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.sums, group=groups.data)


def seen_while_changing(ranks: RankContext, recipe: Recipe, factor: float) -> dict[str, Any]:
    """What each linear layer was given, by a walk that multiplies every weight by `factor`; and the loss afterwards."""
    with model_on(ranks, recipe) as model:
        batches = model.batches(recipe, ROWS)
        seen: dict[str, torch.Tensor] = {}

        def change(_: int, statistics: Any) -> None:
            for linear, moments in statistics.items():
                seen[linear.name] = moments.sums
                linear.put(linear.whole() * factor)

        walk(model.chunk, model.shards, batches, model.groups, Moments, change)
        afterwards = {linear: Moments(linear) for layer in linears(model.chunk, model.shards, model.groups) for linear in layer}
        with torch.no_grad(), watching(afterwards):
            for batch in batches:
                model.chunk(batch.tokens, batch.position_ids, None)
        for moments in afterwards.values():
            moments.reduce(model.groups)
        whole = {key: tensor for layer in linears(model.chunk, model.shards, model.groups) for key, tensor in _weights(layer)}
        return {"walk": seen, "forward": {linear.name: moments.sums for linear, moments in afterwards.items()}, "weights": whole}


def _weights(layer: list[Linear]) -> list[tuple[str, torch.Tensor]]:
    return [(linear.name, linear.whole()) for linear in layer]


@pytest.mark.parametrize("shape", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
def test_alike_at_every_layout(ranks: Any, shape: dict[str, Any]) -> None:
    recipe = tiny_recipe(model=shape)
    results = {name: ranks(world).run(seen_while_changing, at(recipe, tensor), 0.5)[0] for name, (world, tensor) in LAYOUTS.items()}
    one = results["one rank"]
    assert len(one["walk"]) == 4 * recipe.model.num_layers
    for name, other in results.items():
        for part in ("walk", "forward", "weights"):
            for linear, expected in one[part].items():
                difference = relative_difference(other[part][linear], expected)
                assert difference < 1e-5, (name, part, linear, difference)


def test_a_walk_that_changes_nothing_sees_what_a_forward_does(ranks: Any) -> None:
    found = ranks(1).run(seen_while_changing, tiny_recipe(), 1.0)[0]
    for name, sums in found["forward"].items():
        torch.testing.assert_close(found["walk"][name], sums, rtol=1e-9, atol=1e-9)


def test_later_layers_see_what_earlier_ones_became(ranks: Any) -> None:
    """Of the first layer the walk sees the attention as it was; of the second, what the halved first layer gives."""
    halved, kept = (ranks(1).run(seen_while_changing, tiny_recipe(), factor)[0] for factor in (0.5, 1.0))
    first, second = "decoder.layers.0.mlp.linear_fc2", "decoder.layers.1.self_attention.linear_qkv"
    assert torch.equal(halved["walk"][first], kept["walk"][first])
    assert not torch.allclose(halved["walk"][second], kept["walk"][second], rtol=1e-2)
    torch.testing.assert_close(halved["walk"][second], halved["forward"][second], rtol=1e-9, atol=1e-9)
