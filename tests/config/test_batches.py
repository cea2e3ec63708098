"""What is said about a recipe's batches before work starts."""

from __future__ import annotations

from typing import Any

import pytest

from largeformer.config.batches import data_problems
from tests.recipes import GPT2, LLAMA, tiny_recipe

TEXT = {"path": "a.txt"}
CURRICULUM = {"type": "curriculum", "difficulty": "rarity"}


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        pytest.param({"reset_position_ids": True}, LLAMA, "data.reset_position_ids true changes nothing", id="relative positions"),
        pytest.param({"reset_position_ids": True}, GPT2, None, id="learned positions"),
        pytest.param({"reset_position_ids": True, "reset_attention_mask": True}, LLAMA, None, id="both"),
        pytest.param({"sources": [{**TEXT, "split": "1,2"}]}, LLAMA, "data.sources.0.split '1,2'", id="half a split"),
        pytest.param({"sources": [{**TEXT, "split": "0,0,0"}]}, LLAMA, "data.sources.0.split '0,0,0'", id="an empty split"),
        pytest.param({"sources": [TEXT, {**TEXT, "split": "0,1,0"}]}, LLAMA, None, id="one validates"),
        pytest.param({"sources": [{**TEXT, "split": "0,1,0"}]}, LLAMA, "without training", id="nothing trains"),
        pytest.param({"split": "0,1,1"}, LLAMA, "data.split '0,1,1'", id="no training split"),
        pytest.param({"sources": [{"path": "mock"}], "sampling": CURRICULUM}, LLAMA, "holds mock", id="a curriculum of random tokens"),
        pytest.param({"sampling": {**CURRICULUM, "difficulty": "loss"}}, LLAMA, "loss needs a folder of scores", id="no scores"),
        pytest.param({"sampling": {**CURRICULUM, "scores": "x"}}, LLAMA, "do not go together", id="scores without need"),
        pytest.param({"sampling": {"type": "loss"}}, LLAMA, "holds one: add another", id="one source against itself"),
        pytest.param({"sources": [TEXT] * 2, "sampling": {"type": "loss"}, "num_workers": 2}, LLAMA, "would run ahead", id="processes"),
        pytest.param({"sources": [TEXT] * 2, "sampling": {"type": "loss"}}, LLAMA, None, id="sources by their losses"),
    ],
)
def test_what_is_said(data: dict[str, Any], model: dict[str, Any], said: str | None) -> None:
    recipe = tiny_recipe(data={"sources": [TEXT], **data}, model=model)
    problems = list(data_problems(recipe))
    assert len(problems) == (said is not None) and (said is None or said in problems[0]), problems


def test_rewinding_and_sampling_by_loss() -> None:
    recipe = tiny_recipe(data={"sources": [TEXT] * 2, "sampling": {"type": "loss"}}, guards={"spike_action": "rewind"})
    assert ["guards.spike_action rewind" in problem for problem in data_problems(recipe)] == [True]


def test_the_order_of_batches_is_no_part_of_what_prepare_makes() -> None:
    plain, other = tiny_recipe(), tiny_recipe(data={"sources": [{"path": "mock"}], "reset_attention_mask": True, "eod_mask_loss": True})
    assert plain.identity("prepare") == other.identity("prepare")
    assert plain.identity("pretrain") != other.identity("pretrain")
