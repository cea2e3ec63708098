"""Weights that are fitted where channels and heads go: numpy's least squares, alike at every layout, and closer than leaving out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from largeformer.compression.layerwise import watching
from largeformer.compression.linears import linears
from largeformer.compression.pruning.reconstruct import least_squares, reconstruct
from largeformer.compression.pruning.sparsegpt import Hessian
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.recipes import GPT2, LLAMA, tiny_recipe

OUT, IN, TOKENS = 6, 10, 200
STAY = torch.tensor([0, 2, 3, 5, 6, 7, 9])
ROWS = 4
STAYING = {"fc2": torch.arange(0, 96, 2), "proj": torch.arange(16, 64)}


def hessian_of(inputs: torch.Tensor) -> Hessian:
    shard = SimpleNamespace(parameter=torch.empty(0))
    made = Hessian(SimpleNamespace(name="a layer", shape=(OUT, inputs.shape[1]), shards=(shard,)))  # type: ignore[arg-type]
    made.update(inputs)
    return made


def inputs_of(seed: int) -> torch.Tensor:
    """Channels that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, IN, generator=draw) @ torch.randn(IN, IN, generator=draw) + 0.1


def test_the_fit_is_numpys_least_squares() -> None:
    inputs, weight = inputs_of(1), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    fitted = least_squares(weight, hessian_of(inputs), STAY, 1e-9)
    expected = np.linalg.lstsq(inputs[:, STAY].double().numpy(), (inputs.double() @ weight.double().t()).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(fitted[:, STAY].numpy(), expected, rtol=0, atol=1e-4)
    gone = [channel for channel in range(IN) if channel not in STAY.tolist()]
    assert not fitted[:, gone].any()


def test_zeros_stay_and_silent_channels_need_no_inverse() -> None:
    inputs, weight = inputs_of(1), torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    inputs[:, 5], inputs[:, 1] = 0.0, 0.0
    weight[2, 6] = 0.0
    fitted = least_squares(weight, hessian_of(inputs), STAY, 0.01)
    assert torch.isfinite(fitted).all() and fitted[2, 6] == 0 and torch.equal(fitted[:, 5], weight[:, 5])
    assert torch.equal(least_squares(weight, hessian_of(torch.zeros(TOKENS, IN)), STAY, 0.01)[:, STAY], weight[:, STAY])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    inputs = inputs_of(1)
    inputs[3, 3] = value
    with pytest.raises(BadInputError, match="the inputs of a layer on the calibration text are not finite: begin with a sound"):
        least_squares(torch.ones(OUT, IN), hessian_of(inputs), STAY, 0.01)


def test_inputs_without_a_fit_are_refused() -> None:
    inputs = torch.ones(TOKENS, IN)
    hessian = hessian_of(inputs)
    hessian.sum[0, 2] = hessian.sum[2, 0] = 2.0 * TOKENS  # as rounding may leave it, only more
    with pytest.raises(BadInputError, match=r"the inputs of a layer have no invertible covariance: raise prune\.dampening \(1e-09\)"):
        least_squares(torch.ones(OUT, IN), hessian, STAY, 1e-9)


def staying(name: str) -> torch.Tensor:
    return next((channels for part, channels in STAYING.items() if part in name), torch.arange(10**4))


class Inputs:
    """All that went in, [n, i], of every data rank."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def update(self, inputs: torch.Tensor) -> None:
        self.seen.append(inputs.double())

    def reduce(self, groups: Any) -> None: ...


def fitted(ranks: RankContext, recipe: Recipe) -> dict[str, torch.Tensor]:
    """The changed weights of a model, and by `error` how far a layer's outputs are off with them and with the others set to 0."""
    with model_on(ranks, recipe) as model, torch.no_grad():
        batches = model.batches(recipe, ROWS)
        first = next(linear for linear in linears(model.chunk, model.shards, model.groups)[0] if linear.name.endswith("linear_proj"))
        whole, seen = first.whole().double(), Inputs()
        with watching({first: seen}):
            for batch in batches:
                model.chunk(batch.tokens, batch.position_ids, None)
        wanted = {shard.key for shard in model.shards}
        stored = {linear.keys[0]: linear.whole() for layer in linears(model.chunk, model.shards, model.groups) for linear in layer}
        changed = reconstruct(model.chunk, model.shards, batches, model.groups, staying, stored.__getitem__, 0.01, wanted)
        assert torch.equal(first.whole().cpu(), changed[first.keys[0]]), "the model that the text goes on through is the changed one"
        stay, inputs = STAYING["proj"], torch.cat(seen.seen)
        outputs = inputs @ whole.t()
        errors = [(inputs[:, stay] @ weight[:, stay].t() - outputs).norm() for weight in (changed[first.keys[0]].double(), whole)]
        return {**changed, "error": torch.stack(errors)}


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_alike_at_every_layout_and_closer_than_leaving_out(ranks: Any, style: str) -> None:
    recipe = tiny_recipe(model={"llama": LLAMA, "gpt2": GPT2}[style])
    one = ranks(1).run(fitted, recipe)[0]
    assert one["error"][0] < 0.9 * one["error"][1]
    names = [name for name in one if name != "error"]
    assert len(names) == 2 * recipe.model.num_layers and all("linear_proj" in name or "linear_fc2" in name for name in names)
    for world, tensor in ((2, 2), (2, 1)):
        for other in ranks(world).run(fitted, at(recipe, tensor)):
            for name in names:
                torch.testing.assert_close(other[name], one[name], rtol=0, atol=2e-4)
