"""`run.stages`: how entries are written, what each makes of the recipe, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from largeformer.config.chain import at_stage, entry_named
from largeformer.config.checks import recipe_problems
from largeformer.config.load import load_recipe, recipe_yaml
from largeformer.config.source import read_yaml
from largeformer.errors import BadInputError
from tests.recipes import tiny_recipe

TWICE: list[Any] = ["prepare", "pretrain", "distill", {"distill": {"name": "distill-2", "alpha": 0.5, "train": {"train_iters": 7}}}]


def test_entries_are_kept_as_they_were_written(tmp_path: Path) -> None:
    recipe = tiny_recipe(run={"stages": TWICE})
    assert [entry.name for entry in recipe.run.stages] == ["prepare", "pretrain", "distill", "distill-2"]
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(recipe))
    assert read_yaml(path)[0]["run"]["stages"] == TWICE
    assert load_recipe(str(path)).run.stages == recipe.run.stages


def test_an_entry_changes_its_own_section_and_its_training() -> None:
    recipe = tiny_recipe(run={"stages": TWICE}, distill={"temperature": 2.0, "optimizer": {"lr": 5.0e-4}})
    first, second = (at_stage(recipe, entry) for entry in recipe.run.stages[2:])
    assert (first.distill.alpha, first.distill.temperature, first.train.train_iters, first.optimizer.lr) == (0.7, 2.0, 4, 5.0e-4)
    assert (second.distill.alpha, second.distill.temperature, second.train.train_iters, second.optimizer.lr) == (0.5, 2.0, 7, 5.0e-4)
    assert recipe.train.train_iters == 4
    assert first.identity("distill") != second.identity("distill")
    assert entry_named(recipe, "distill").name == "distill" and entry_named(recipe, "prune").name == "prune"


def test_what_belongs_to_one_stage_changes_no_other() -> None:
    plain, other = tiny_recipe(), tiny_recipe(quantize={"scheme": "w4a16"}, distill={"alpha": 0.1})
    assert [stage for stage in ("prepare", "pretrain", "prune", "distill", "quantize", "export") if
            plain.identity(stage) != other.identity(stage)] == ["distill", "quantize"]  # fmt: skip


REFUSED: dict[str, tuple[list[Any], str]] = {
    "two of one name": (
        ["distill", "distill"],
        "give one of them another name, as in {distill: {name: distill-2}}",
    ),
    "no folder name": ([{"prune": {"name": "../prune"}}], "no plain folder name"),
    "the folder of another stage": ([{"distill": {"name": "pretrain"}}], "names a distill pretrain, which is the folder of something else"),
    "the folder of imports": ([{"prune": {"name": "import"}}], "names a prune import, which is the folder of something else"),
    "a folder that was set aside": ([{"prune": {"name": "prune.old-1"}}], "which is the folder of something else: choose another name"),
    "a pretraining by another name": ([{"pretrain": {"name": "teacher"}}], "run.stages names its pretrain teacher: a run has one"),
    "an unknown key": ([{"distill": {"alhpa": 0.5}}], "in distill: unknown key alhpa; did you mean"),
    "a wrong value": ([{"distill": {"name": "d", "alpha": 2.0}}], "in d: alpha is 2.0, which should be at most 1"),
    "a wrong value of training": ([{"distill": {"train": {"train_iters": 0}}}], "in distill.train: train_iters is 0"),
    "a schedule that is no longer one": (
        ["pretrain", {"distill": {"name": "d", "optimizer": {"lr_wsd_decay_iters": 2}}}],
        "in d: optimizer.lr_wsd_decay_iters 2 has no meaning with lr_decay_style",
    ),
    "keys of a stage without a section": ([{"pretrain": {"alpha": 1}}], "the stage pretrain has none but name"),
}


@pytest.mark.parametrize(("stages", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(stages: list[Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(tiny_recipe(run={"stages": stages})))
    with pytest.raises(BadInputError) as caught:
        load_recipe(str(path))
    assert any(sentence in problem for problem in caught.value.problems), caught.value.problems


LIMITS = {
    "a slip": ("distil", "is none of run.stages (prepare, pretrain, distill, distill-2, export); did you mean distill?"),
    "no stage of this chain": ("prune", "is none of run.stages (prepare, pretrain, distill, distill-2, export)"),
    "no model": ("export", "leaves no model to be compared: name one of pretrain, distill, distill-2, or leave it out"),
}


@pytest.mark.parametrize(("name", "sentence"), LIMITS.values(), ids=LIMITS)
def test_limits_of_what_is_not_measured(name: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_yaml(tiny_recipe(run={"stages": [*TWICE, "export"]}, quality={"limits": {name: {"max_kl": 1.0}}})))
    with pytest.raises(BadInputError) as caught:
        load_recipe(str(path))
    assert caught.value.problems == [f"quality.limits names {name}, which {sentence}"]


def test_limits_of_what_is() -> None:
    tiny = tiny_recipe(run={"stages": TWICE}, quality={"limits": {"distill-2": {"max_kl": 1.0}}})
    assert recipe_problems(tiny) == []
