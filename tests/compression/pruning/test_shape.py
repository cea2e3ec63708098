"""What shape a structured pruning leaves, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from largeformer.compression.pruning.shape import narrowed, pruned_shape
from largeformer.config.prune import PruneConfig, prune_problems
from largeformer.config.schema import EarlyStoppingConfig, ModelConfig, TrainConfig
from largeformer.errors import BadInputError
from largeformer.models.flops import parameter_count

VOCABULARY = 4096
MODEL = ModelConfig(num_layers=12, hidden_size=256, ffn_hidden_size=704, num_attention_heads=8, num_query_groups=4, seq_length=64)
TRAIN = TrainConfig(micro_batch_size=1, global_batch_size=1, train_iters=100)
MULTI_HEAD = MODEL.model_copy(update={"num_query_groups": None})


def prune(**keys: Any) -> PruneConfig:
    return PruneConfig.model_validate(keys)


SIZES = {
    "one axis": (MODEL, {"ffn_hidden_size": 600}, {"ffn_hidden_size": (704, 600)}),
    "heads within groups": (MODEL, {"num_attention_heads": 4}, {"num_attention_heads": (8, 4)}),
    "groups with their heads": (MODEL, {"num_query_groups": 3}, {"num_attention_heads": (8, 6), "num_query_groups": (4, 3)}),
    "groups and heads": (
        MODEL,
        {"num_query_groups": 2, "num_attention_heads": 2},
        {"num_attention_heads": (8, 2), "num_query_groups": (4, 2)},
    ),
    "heads are groups": (MULTI_HEAD, {"num_attention_heads": 5}, {"num_attention_heads": (8, 5), "num_query_groups": (8, 5)}),
    "layers": (MODEL, {"method": "depth", "num_layers": 10}, {"num_layers": (12, 10)}),
}


@pytest.mark.parametrize(("model", "keys", "expected"), SIZES.values(), ids=SIZES)
def test_sizes_as_given(model: ModelConfig, keys: dict[str, Any], expected: dict[str, tuple[int, int]]) -> None:
    after = pruned_shape(model, VOCABULARY, prune(**keys))
    assert narrowed(model, after) == expected
    assert after.kv_channels == 32 and after.head_dim == model.head_dim


TARGETS = {
    "default": ({}, 0.85, 0.84),
    "one axis": ({"target_parameters": 0.7, "axes": ("ffn_hidden_size",)}, 0.7, 0.69),
    "three axes": ({"target_parameters": 0.6, "axes": ("hidden_size", "ffn_hidden_size", "num_attention_heads")}, 0.6, 0.59),
    "one size given": ({"target_parameters": 0.6, "ffn_hidden_size": 512}, 0.6, 0.57),
    "a number": ({"target_parameters": 8_000_000}, 8_000_000, 7_900_000),
    "layers": ({"method": "depth", "target_parameters": 0.8}, 0.8, 0.74),
    "coarse": ({"target_parameters": 0.8, "multiple_of": 64}, 0.8, 0.7),
}


@pytest.mark.parametrize(("keys", "most", "least"), TARGETS.values(), ids=TARGETS)
def test_targets(keys: dict[str, Any], most: float, least: float) -> None:
    """At most what was asked for, and near it; in multiples; query groups as they were."""
    settings = prune(**keys)
    after = pruned_shape(MODEL, VOCABULARY, settings)
    full, found = parameter_count(MODEL, VOCABULARY), parameter_count(after, VOCABULARY)
    scale = full if most < 1 else 1
    assert least * scale <= found <= most * scale
    assert after.query_groups == MODEL.query_groups and after.num_attention_heads % 4 == 0
    for axis, size in (("hidden_size", after.hidden_size), ("ffn_hidden_size", after.ffn_size)):
        assert size in (getattr(MODEL, axis), settings.sizes.get(axis)) or size % settings.multiple_of == 0


REFUSED = {
    "no head in a group": ({"num_attention_heads": 2}, "leaves no equal number of heads in each of 4 query groups"),
    "uneven heads": ({"num_attention_heads": 6}, "leaves no equal number of heads"),
    "more heads than there are": ({"num_query_groups": 2, "num_attention_heads": 8}, "leaves 4 heads in each, and there are 2"),
    "wider": ({"ffn_hidden_size": 1024}, "prune.ffn_hidden_size is 1024, and the model has 704"),
    "deeper": ({"method": "depth", "num_layers": 13}, "prune.num_layers is 13, and the model has 12"),
    "the same": ({"method": "depth", "num_layers": 12}, "are the sizes that the model has"),
    "too small": ({"target_parameters": 1e-4}, "can be had: change it, or prune.axes"),
    "not one layer": ({"method": "depth", "target_parameters": 0.01}, "by num_layers"),
    "larger than it is": ({"target_parameters": 10**9}, "asks for 1,000,000,000"),
    "nothing free": ({"target_parameters": 0.5, "hidden_size": 128, "ffn_hidden_size": 352}, "leave nothing to reach it by"),
}


@pytest.mark.parametrize(("keys", "sentence"), REFUSED.values(), ids=REFUSED)
def test_shapes_that_cannot_be(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInputError, match=sentence):
        pruned_shape(MODEL, VOCABULARY, prune(**keys))


RULES = {
    "an axis of the other method": ({"method": "depth", "ffn_hidden_size": 600}, "it belongs to width"),
    "layers for width": ({"num_layers": 10}, "it belongs to depth"),
    "sparsity for width": ({"sparsity": 0.5}, "it belongs to magnitude and wanda and sparsegpt"),
    "a size for wanda": ({"method": "wanda", "target_parameters": 0.5}, "it belongs to width and depth"),
    "a broken number": ({"target_parameters": 1.5}, "neither a share below 1 nor a whole number"),
    "ablation of width": ({"importance": "ablation"}, "use activation or weight"),
    "no pattern": ({"method": "wanda", "pattern": "2-4"}, "is no N:M"),
    "a pattern that keeps all": ({"method": "wanda", "pattern": "4:4"}, "is no N:M"),
    "a pattern that keeps none": ({"method": "wanda", "pattern": "0:4"}, "is no N:M"),
    "two amounts": ({"method": "magnitude", "sparsity": 0.5, "pattern": "2:4"}, "give one of them"),
    "threshold for wanda": ({"method": "wanda", "threshold": 0.1}, "it belongs to magnitude"),
    "schedule for wanda": ({"method": "wanda", "schedule": {"end": 5}}, "it belongs to magnitude"),
    "a schedule with a pattern": ({"method": "magnitude", "pattern": "2:4", "schedule": {"end": 5}}, "lets a share grow"),
    "a schedule beyond the training": ({"method": "magnitude", "schedule": {"end": 100}}, "from step 0 to 100 of 100"),
    "a schedule backwards": ({"method": "magnitude", "schedule": {"start": 9, "end": 5}}, "from step 9 to 5"),
    "a schedule with an early end": (
        {"method": "magnitude", "schedule": {"end": 5}, "train": {"early_stopping": {"patience": 2}}},
        "prune.train.early_stopping: null",
    ),
    "global wanda": ({"method": "wanda", "scope": "global"}, "needs prune.method magnitude"),
}


@pytest.mark.parametrize(("keys", "sentence"), RULES.values(), ids=RULES)
def test_keys_that_do_not_go_together(keys: dict[str, Any], sentence: str) -> None:
    problems = list(prune_problems(prune(**keys), TRAIN))
    assert len(problems) == 1 and sentence in problems[0], problems


ALLOWED = {
    "default": {},
    "global": {"method": "magnitude", "scope": "global", "sparsity": 0.7},
    "gradual": {"method": "magnitude", "schedule": {"start": 10, "end": 99}},
    "depth by ablation": {"method": "depth", "importance": "ablation"},
    "2:4": {"method": "sparsegpt", "pattern": "2:4"},
}


@pytest.mark.parametrize("keys", ALLOWED.values(), ids=ALLOWED)
def test_keys_that_do(keys: dict[str, Any]) -> None:
    assert not list(prune_problems(prune(**keys), TRAIN))


def test_a_schedule_may_take_back_the_recipes_early_stopping() -> None:
    schedule, train = {"method": "magnitude", "schedule": {"end": 5}}, TRAIN.model_copy(update={"early_stopping": EarlyStoppingConfig()})
    assert len(list(prune_problems(prune(**schedule), train))) == 1
    assert not list(prune_problems(prune(**schedule, train={"early_stopping": None}), train))
