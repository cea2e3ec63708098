"""SmoothQuant changes what is rounded, and nothing of what is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from largeformer.compression.linears import linears
from largeformer.compression.quantization.calibration import channel_ranges
from largeformer.compression.quantization.smoothquant import smooth
from largeformer.config.schema import Recipe
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.one_process import relative_difference
from tests.recipes import GPT2, LLAMA, tiny_recipe

SHAPES = {
    "llama": LLAMA,
    "llama, biases": {**LLAMA, "add_bias_linear": True, "add_qkv_bias": True},
    "gpt2": GPT2,
}


def smoothed(ranks: RankContext, recipe: Recipe, projections: bool, alpha: float = 0.5) -> dict[str, Any]:
    """Logits before and after, the weights, and the ranges of what goes into each layer."""
    with model_on(ranks, recipe) as model, torch.no_grad():
        for name, parameter in model.chunk.named_parameters():
            if "layernorm" in name and name.endswith("weight"):
                parameter[3] *= 8  # an outlier channel, as large models have them
        batches, layers = model.batches(recipe, 3), linears(model.chunk, model.shards, model.groups)
        each = [linear for layer in layers for linear in layer]

        def logits() -> torch.Tensor:
            return torch.cat([model.chunk(b.tokens, b.position_ids, None, runtime_gather_output=True) for b in batches])

        before, ranges = logits(), channel_ranges(model.chunk, each, batches, model.groups)
        smooth(model.chunk, layers, ranges, recipe.model, alpha, projections)
        after = logits()
        later = channel_ranges(model.chunk, each, batches, model.groups)
        return {
            "before": before,
            "after": after,
            "weights": {linear.name: linear.whole() for linear in each},
            "ranges": {linear.name: (ranges[linear], later[linear]) for linear in each},
        }


@pytest.mark.parametrize("projections", [False, True], ids=["norms", "projections too"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_same_logits_at_any_layout(ranks: Any, shape: dict[str, Any], projections: bool) -> None:
    recipe = tiny_recipe(model=shape)
    one = ranks(1).run(smoothed, recipe, projections)[0]
    two = ranks(2).run(smoothed, at(recipe, 2), projections)[0]
    for found in (one, two):
        assert (found["after"] - found["before"]).abs().max() < 2e-4 * found["before"].std()
    assert all(relative_difference(two["weights"][name], weight) < 1e-5 for name, weight in one["weights"].items())


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_factors_by_their_formula(ranks: Any, alpha: float) -> None:
    """Of the product of an input channel's range and its column's, the channel keeps the power 1 - alpha, and the column gets alpha."""
    found = ranks(1).run(smoothed, tiny_recipe(model=LLAMA), True, alpha)[0]
    for name, (before, after) in found["ranges"].items():
        if name.endswith(("linear_qkv", "linear_fc1", "linear_fc2")):
            columns = found["weights"][name].abs().amax(dim=0)
            torch.testing.assert_close(after**alpha, columns ** (1 - alpha), rtol=1e-4, atol=1e-6)
            assert after.max() / after.median() < before.max() / before.median() or name.endswith("fc2")


def test_the_head_of_a_feed_forward_without_gate_is_left(ranks: Any) -> None:
    found = ranks(1).run(smoothed, tiny_recipe(model=GPT2), True)[0]
    changed = {name.rpartition(".")[2] for name, (before, after) in found["ranges"].items() if not torch.allclose(before, after, rtol=1e-3)}
    assert changed == {"linear_qkv", "linear_proj", "linear_fc1"}
