"""What a later stage of a chain would refuse is told before anything is trained, by the shapes that the models will have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.config.load import load_recipe, recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.pipeline_shapes import check_shapes
from tests.recipes import tiny_recipe

CHAIN = ["prepare", "pretrain", "prune", "distill", "quantize", "export"]
NARROW = {"method": "width", "target_parameters": 0.85, "axes": ["ffn_hidden_size"]}


def chain(stages: list[Any] = CHAIN, **sections: Any) -> Recipe:
    return tiny_recipe(run={"stages": stages}, **{"prune": NARROW, **sections})


REFUSED: dict[str, tuple[Recipe, str]] = {
    "a group of what is pruned": (
        chain(prune={"method": "width", "ffn_hidden_size": 72}, quantize={"scheme": "w4a16", "group_size": 32}),
        "quantize: quantize.group_size 32 does not divide 72, the inputs of 4 layers such as model.layers.0.mlp.down_proj",
    ),
    "a target out of reach": (chain(prune={**NARROW, "target_parameters": 0.01}), "prune: prune.target_parameters asks for"),
    "no head is left": (
        chain(prune={"method": "width", "num_attention_heads": 3, "num_query_groups": 2}),
        "prune: prune.num_attention_heads 3 leaves no equal number of heads",
    ),
    "a pattern": (
        chain(prune={"method": "magnitude", "pattern": "2:3"}),
        "prune: prune.pattern 2:3",
    ),
    "a student deeper than its teacher": (
        chain([*CHAIN[:2], "distill"], distill={"student": {"init": "teacher_layers", "model": {"num_layers": 9}}}),
        "distill: the student has 9 layers",
    ),
    "pruned twice": (
        chain([*CHAIN[:3], {"prune": {"name": "again", "target_parameters": None, "ffn_hidden_size": 120}}]),
        "again: prune.ffn_hidden_size is 120, and the model has 64",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    recipe, sentence = REFUSED[name]
    with pytest.raises(BadInputError) as caught:
        check_shapes(recipe)
    assert any(problem.startswith(sentence) for problem in caught.value.problems), caught.value.problems


ACCEPTED: dict[str, Recipe] = {
    "what stages without a pipeline may leave": chain(
        [*CHAIN[:3], "quantize"], prune={"method": "depth", "num_layers": 3}, parallel={"pipeline_model_parallel_size": 2}
    ),
    "a teacher elsewhere": chain(
        [*CHAIN[:4], {"prune": {"name": "again", "target_parameters": None, "ffn_hidden_size": 120}}],
        distill={"teacher": "runs/large", "student": {"init": "teacher_layers", "model": {"num_layers": 9}}},
    ),
    "healed by training": chain(["prepare", "prune", "pretrain"], prune={**NARROW, "target_parameters": 0.01}),
    "a chain": chain(),
    "what is there already": chain(CHAIN[2:], prune={**NARROW, "target_parameters": 0.01}),
    "a student of its own": chain(
        [*CHAIN[:2], "distill", "quantize"],
        distill={"student": {"init": "scratch", "model": {"ffn_hidden_size": 64}}},
        quantize={"scheme": "w4a16", "group_size": 32},
    ),
    "half the teacher's layers after a pruning": chain(distill={"student": {"init": "teacher_layers", "model": {"num_layers": 1}}}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str) -> None:
    check_shapes(ACCEPTED[name])


@pytest.mark.parametrize("recipe", ["compress", "quickstart"])
def test_the_recipes_that_come_along_are_possible(recipe: str) -> None:
    check_shapes(load_recipe(recipe))


def test_the_first_refusal_is_the_only_one() -> None:
    """What would follow it is not known."""
    recipe = chain(prune={"method": "width", "ffn_hidden_size": 200}, quantize={"scheme": "w4a16", "group_size": 64})
    with pytest.raises(BadInputError) as caught:
        check_shapes(recipe)
    assert len(caught.value.problems) == 1


def test_a_chain_whose_model_is_trained_is_left_to_its_stages(tmp_path: Path) -> None:
    recipe, _ = REFUSED["a group of what is pruned"]
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"output_dir": str(tmp_path)})})
    Artifact("pretrain", tmp_path / "pretrain", "0").write()
    check_shapes(recipe)


def test_a_chain_is_refused_before_its_first_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, sentence = REFUSED["a group of what is pruned"]
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    assert cli.main(["run", "-c", str(tmp_path / "recipe.yaml"), f"run.output_dir={tmp_path / 'run'}", "train.train_iters=1"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "prepare").exists()


def test_groups_that_do_not_divide_what_compress_prunes() -> None:
    with pytest.raises(BadInputError, match=r"quantize\.group_size 128 does not divide 576"):
        check_shapes(load_recipe("compress", ["quantize.scheme=w4a16"]))
    check_shapes(load_recipe("compress", ["quantize.scheme=w4a16", "quantize.group_size=64"]))
