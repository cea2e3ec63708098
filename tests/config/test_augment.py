"""`data.augment`: what does nothing or cannot be done is told, and what is prepared does not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.config.augment import AugmentConfig, DeletionStep, SynonymsStep, augment_problems
from largeformer.config.load import load_recipe, recipe_yaml
from tests.config.recipes import problems_of, write_recipe

# name: (data.augment, the problems' beginnings, whole and in order)
BAD: dict[str, tuple[str, list[str]]] = {
    "nothing": ("{}", ["data.augment does nothing for model.family gpt: set data.augment.permute_sentences to true"]),
    "words of a causal LM": (
        "{steps: [deletion], permute_window: 3, mixup_alpha: 0.2}",
        ["data.augment.steps and data.augment.permute_window and data.augment.mixup_alpha do not go with model.family gpt"],
    ),
    "synonyms from nowhere": (
        "{steps: [synonyms, {step: insertion, count: 2}]}",
        ["data.augment.steps synonyms and insertion need synonyms", "data.augment.steps does not go with model.family gpt"],
    ),
    "misspelt step": ("{steps: [delete]}", ["data.augment.steps[0].step is 'delete', which is none of synonyms, insertion, swap"]),
    "rate above one": ("{steps: [{step: deletion, rate: 2.0}]}", ["data.augment.steps[0].rate is 2.0, which should be at most 1"]),
    "window of one": ("{permute_window: 1}", ["data.augment.permute_window is 1, which should be at least 2"]),
}


@pytest.mark.parametrize(("augment", "expected"), BAD.values(), ids=BAD)
def test_bad_augment_is_told(tmp_path: Path, augment: str, expected: list[str]) -> None:
    found = problems_of(tmp_path, f"data.augment={augment}")
    assert len(found) == len(expected), found
    assert all(problem.startswith(beginning) for problem, beginning in zip(found, expected, strict=True)), found


def test_examples_of_other_models_may_be_varied() -> None:
    config = AugmentConfig(steps=(SynonymsStep(), DeletionStep()), wordnet="/usr/share/wordnet", permute_window=3, mixup_alpha=0.2)
    assert not list(augment_problems(config, "bert", "random")) and not list(augment_problems(None, "gpt", "random"))


def test_augmentation_changes_training_and_not_what_is_prepared(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    plain, varied = load_recipe(path), load_recipe(path, ["data.augment={permute_sentences: true}"])
    assert plain.identity("prepare") == varied.identity("prepare")
    assert plain.identity("pretrain") != varied.identity("pretrain")
    assert load_recipe(write_recipe(tmp_path, recipe_yaml(varied))) == varied
