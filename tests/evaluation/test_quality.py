"""One model beside another: the figures are those of the formulas over whole logits, at every layout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.evaluation.quality import compare, fastest
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.recipes import tiny_recipe

ROWS, FACTOR = 4, 0.7


def _sizes(vocab_size: int) -> np.ndarray:
    return np.arange(vocab_size, dtype=np.int32) % 5


def measured(ranks: RankContext, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model beside one whose last norm is another; and beside itself."""
    with model_on(ranks, recipe) as model, model_on_same(recipe, model) as other:
        sizes = _sizes(recipe.tokenizer.vocab_size)
        batches = model.batches(recipe, ROWS)
        for batch in batches:
            batch.loss_mask[:, :3] = 0.0
        found = compare(other, model.chunk, batches, model.groups, sizes)
        same = compare(model.chunk, model.chunk, batches, model.groups, sizes)
        return found.metrics(), same.metrics()


class model_on_same:
    """A second model of the same recipe in the same groups, every other channel of its last norm scaled."""

    def __init__(self, recipe: Recipe, model: Any) -> None:
        from largeformer.models.gpt import build_gpt

        (self.chunk,), _ = build_gpt(recipe, model.groups, torch.device("cpu"))
        self.chunk.load_state_dict(model.chunk.state_dict())
        with torch.no_grad():
            self.chunk.decoder.final_layernorm.weight[::2].mul_(FACTOR)
        self.chunk.eval()

    def __enter__(self) -> Any:
        return self.chunk

    def __exit__(self, *_: object) -> None:
        del self.chunk


def by_formula(ranks: RankContext, recipe: Recipe) -> dict[str, float]:
    """In float64, from whole logits, on one rank."""
    with model_on(ranks, recipe) as model, model_on_same(recipe, model) as other:
        vocab_size, sizes = recipe.tokenizer.vocab_size, torch.from_numpy(_sizes(recipe.tokenizer.vocab_size))
        totals = dict.fromkeys(("tokens", "bytes", "loss", "reference_loss", "kl", "agree"), 0.0)
        for batch in model.batches(recipe, ROWS):
            with torch.no_grad():
                theirs, ours = (
                    torch.softmax(chunk(batch.tokens, batch.position_ids, None)[0, 3:, :vocab_size].double(), -1)
                    for chunk in (model.chunk, other)
                )
            labels = batch.labels[0, 3:]
            totals["tokens"] += len(labels)
            totals["bytes"] += sizes[labels].sum().item()
            totals["loss"] -= ours[range(len(labels)), labels].log().sum().item()
            totals["reference_loss"] -= theirs[range(len(labels)), labels].log().sum().item()
            totals["kl"] += (theirs * (theirs / ours).log()).sum().item()
            totals["agree"] += (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
        n = totals["tokens"]
        loss, reference = totals["loss"] / n, totals["reference_loss"] / n
        return {
            "tokens": n,
            "bytes": totals["bytes"],
            "loss": loss,
            "reference_loss": reference,
            "kl": totals["kl"] / n,
            "top1_agreement": totals["agree"] / n,
            "perplexity": math.exp(loss),
            "perplexity_increase": math.exp(loss) / math.exp(reference) - 1.0,
            "bits_per_byte": totals["loss"] / math.log(2) / totals["bytes"],
        }


@pytest.mark.parametrize(
    ("world", "tensor"), [pytest.param(1, 1, id="one rank"), pytest.param(2, 2, id="TP2"), pytest.param(2, 1, id="DP2")]
)
def test_figures_are_those_of_the_formulas(ranks: Any, world: int, tensor: int) -> None:
    recipe = tiny_recipe()
    expected = ranks(1).run(by_formula, recipe)[0]
    assert 0.1 < expected["top1_agreement"] < 0.9
    results = ranks(world).run(measured, at(recipe, tensor))
    for found, same in results:
        assert found == pytest.approx(expected, rel=2e-4)
        assert (same["kl"], same["top1_agreement"], same["perplexity_increase"]) == (0.0, 1.0, 0.0)


def broken(ranks: RankContext, recipe: Recipe) -> dict[str, Any]:
    with model_on(ranks, recipe) as model, model_on_same(recipe, model) as other:
        other.output_layer.weight.data.fill_(math.nan)
        batches = model.batches(recipe, ROWS)
        return compare(other, model.chunk, batches, model.groups, _sizes(recipe.tokenizer.vocab_size)).metrics()


def test_a_model_of_nan_is_not_told_to_agree(ranks: Any) -> None:
    (found,) = ranks(1).run(broken, tiny_recipe())
    assert math.isnan(found["kl"]) and math.isnan(found["loss"]) and not found["top1_agreement"] > 0.1


def test_the_fastest_of_calls_that_take_turns() -> None:
    order: list[str] = []
    found = fastest({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert set(found) == {"a", "b"} and all(0.0 < seconds < math.inf for seconds in found.values())
