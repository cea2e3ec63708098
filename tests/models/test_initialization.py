"""Initial weights: the distribution, and that it depends on seed and name alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.models.gather import gather_full
from largeformer.models.gpt import build_gpt
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import create_groups, destroy_groups
from tests.distributed import RankContext, RankPool
from tests.one_process import Built
from tests.recipes import GPT2, tiny_recipe


@pytest.mark.parametrize("changes", [{}, GPT2, {"add_bias_linear": True, "normalization": "LayerNorm"}], ids=["llama", "gpt2", "biases"])
def test_distribution(changes: dict[str, Any], one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(model={**changes, "init_method_std": 0.05})
    for key, values in one_process(recipe).weights().items():
        if "bias" in key:
            assert not values.any(), key
        elif "norm" in key:
            assert torch.equal(values, torch.ones_like(values)), key
        else:
            residual = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.05 / math.sqrt(2 * recipe.model.num_layers) if residual else 0.05
            # Five standard errors of the sample's standard deviation and mean.
            assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel())), key
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), key


def test_padded_rows_are_zero(one_process: Callable[[Recipe], Built]) -> None:
    model = one_process(tiny_recipe(tokenizer={"vocab_size": 249})).model
    for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        assert weight.shape[0] == 256
        assert not weight[249:].any()
        assert weight[:249].abs().sum(dim=1).all()


def test_depends_on_the_seed_and_the_name(one_process: Callable[[Recipe], Built]) -> None:
    first, again, other = (one_process(tiny_recipe(run={"seed": seed})).weights() for seed in (1, 1, 2))
    layers = [f"decoder.layers.{layer}.mlp.linear_fc2.weight" for layer in range(4)]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in layers)
    assert len({first[key].sum().item() for key in layers}) == 4


LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "interleaved pipeline": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "data parallel": {},
}


def initial_weights(ranks: RankContext, recipe: Recipe) -> dict[str, Any]:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    _, shards = build_gpt(recipe, groups, device)
    whole = gather_full(shards, lambda shard: shard.of(shard.parameter))
    destroy_groups()
    return {key: value.numpy() for key, value in whole.items()}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_any_layout_starts_from_the_same_weights(
    name: str, tied: bool, ranks: Callable[[int], RankPool], one_process: Callable[[Recipe], Built]
) -> None:
    model = {**GPT2, "tie_embeddings": tied} if tied else {}
    cut = tiny_recipe(model=model, tokenizer={"vocab_size": 249}, parallel=LAYOUTS[name])
    whole = one_process(tiny_recipe(model=model, tokenizer={"vocab_size": 249})).weights()
    on_first, on_second = ranks(2).run(initial_weights, cut)
    assert on_second == {}
    assert set(on_first) == set(whole)
    for key, values in whole.items():
        assert torch.equal(torch.from_numpy(on_first[key]), values), key
