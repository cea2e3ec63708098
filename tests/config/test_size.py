"""Parameter counts against the published ones, and the fullest rank against a count by hand."""

from __future__ import annotations

import pytest

from largeformer.config.load import load_recipe
from largeformer.config.size import largest_parameter, model_parameters, rank_parameters

# What the released models hold (sum of the elements in their weight files), with their own vocabularies.
PUBLISHED = {"gpt2-125m": 124_439_808, "llama-1b": 1_235_814_400, "llama-8b": 8_030_261_248, "llama-70b": 70_553_706_496}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_shapes_are_the_published_ones(name: str) -> None:
    recipe = load_recipe(name)
    assert model_parameters(recipe.model, recipe.tokenizer.vocab_size) == PUBLISHED[name]


def test_quickstart_has_about_five_million() -> None:
    recipe = load_recipe("quickstart")
    assert model_parameters(recipe.model, recipe.padded_vocab_size) == pytest.approx(5e6, rel=0.02)


def test_fullest_rank() -> None:
    """Llama 3 70B at TP8 PP8: ten layers and one embedding of 129,024 x 8,192, over eight ranks, and a norm at the last stage."""
    layer = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672 + 2 * 8192
    assert rank_parameters(load_recipe("llama-70b")) == (10 * layer + 129_024 * 8192 + 8192) // 8


@pytest.mark.parametrize(("first", "last", "layers"), [(1, None, [1, 3]), (None, 1, [3, 1])])
def test_uneven_pipeline(first: int | None, last: int | None, layers: list[int]) -> None:
    key = "first" if first else "last"
    overrides = ["parallel.pipeline_model_parallel_size=2", f"parallel.num_layers_in_{key}_pipeline_stage=1"]
    layer = (rank_parameters(load_recipe("quickstart")) - 2 * 4096 * 256 - 256) // 4
    assert rank_parameters(load_recipe("quickstart", overrides)) == max(layers) * layer + 4096 * 256 + (256 if layers[1] == 3 else 0)


def test_tied_embeddings_on_two_stages_count_on_both() -> None:
    """One stage holds a tied embedding once; two stages hold a copy each."""
    one, two = ["model.tie_embeddings=true"], ["model.tie_embeddings=true", "parallel.pipeline_model_parallel_size=2"]
    whole = rank_parameters(load_recipe("quickstart", one))
    assert whole == model_parameters(load_recipe("quickstart", one).model, 4096)
    assert rank_parameters(load_recipe("quickstart", two)) == (whole - 4096 * 256 - 256) // 2 + 4096 * 256 + 256


@pytest.mark.parametrize(
    ("override", "elements"), [("tokenizer.vocab_size=64000", 64_000 * 256), ("tokenizer.vocab_size=128", 2 * 704 * 256)]
)
def test_largest_parameter(override: str, elements: int) -> None:
    assert largest_parameter(load_recipe("quickstart", [override])) == elements
