"""Which model the others of a chain are compared with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from largeformer.config.quality import LimitsConfig
from largeformer.stages.quality import failures, first_model, is_judged
from tests.recipes import tiny_recipe

# stages, folders that are there, the teacher -> where the first model lies (None: nothing is compared)
CHAINS: dict[str, tuple[list[Any], list[str], str | None, str | None]] = {
    "the one that is trained": (["prepare", "pretrain", "prune", "distill"], [], None, "run/pretrain"),
    "an import": (["prepare", "quantize"], ["run/import"], None, "run/import"),
    "the teacher of another run": (["prepare", "distill"], ["other"], "other", "other"),
    "the teacher of one stage": (["prepare", {"distill": {"name": "d", "teacher": "other"}}], ["other"], None, "other"),
    "trained here, taught from elsewhere": (["prepare", "pretrain", "distill"], ["other"], "other", "run/pretrain"),
    "a model from elsewhere": (["prepare", "prune"], [], None, None),
    "nothing is derived": (["prepare", "pretrain", "evaluate"], [], None, None),
}


@pytest.mark.parametrize("case", CHAINS)
def test_the_model_that_others_are_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    stages, folders, teacher, expected = CHAINS[case]
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        Path(folder).mkdir(parents=True)
    recipe = tiny_recipe(run={"stages": stages, "output_dir": "run"}, distill={"teacher": teacher})
    assert is_judged(recipe) == (expected is not None)
    if expected is not None:
        assert first_model(recipe) == Path(expected)


FINE = {"loss": 2.0, "perplexity_increase": 0.01, "kl": 0.02, "top1_agreement": 0.9}
JUDGED: dict[str, tuple[dict[str, float], dict[str, float], list[str]]] = {
    "within": ({}, {"max_kl": 0.02, "min_top1_agreement": 0.9, "max_perplexity_increase": 0.01}, []),
    "beyond": ({}, {"max_kl": 0.01}, ["kl is 0.02, quality.limits allow 0.01 (max_kl)"]),
    "below": ({}, {"min_top1_agreement": 0.95}, ["top1_agreement is 0.9, quality.limits allow 0.95 (min_top1_agreement)"]),
    "no number": ({"kl": math.nan}, {"max_kl": 1.0}, ["kl is nan, quality.limits allow 1 (max_kl)"]),
    "no number, no limits": ({"loss": math.nan}, {}, ["the loss is nan: weights or activations are not finite"]),
}


@pytest.mark.parametrize(("changed", "limits", "told"), JUDGED.values(), ids=JUDGED)
def test_what_is_beyond_its_limits(changed: dict[str, float], limits: dict[str, float], told: list[str]) -> None:
    assert failures(FINE | changed, LimitsConfig.model_validate(limits)) == told
