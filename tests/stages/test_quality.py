"""Which model the others of a chain are compared with, and what becomes of one that is not good enough."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.config.quality import LimitsConfig
from largeformer.stages.quality import failures, first_model, is_judged
from tests.recipes import TINY, tiny_recipe

# stages, folders that are there, the teacher -> where the first model lies (None: nothing is compared)
CHAINS: dict[str, tuple[list[Any], list[str], str | None, str | None]] = {
    "the one that is trained": (["prepare", "pretrain", "prune", "distill"], [], None, "run/pretrain"),
    "an import": (["prepare", "quantize"], ["run/import"], None, "run/import"),
    "the teacher of another run": (["prepare", "distill"], ["other"], "other", "other"),
    "the teacher of one stage": (["prepare", {"distill": {"name": "d", "teacher": "other"}}], ["other"], None, "other"),
    "trained here, taught from elsewhere": (["prepare", "pretrain", "distill"], ["other"], "other", "run/pretrain"),
    "a run that was trained before": (["prepare", "prune"], ["run/pretrain"], None, "run/pretrain"),
    "a stage of this run that teaches": (["prepare", "distill"], ["run/big/checkpoints"], "big", "run/big"),
    "a model from elsewhere": (["prepare", "prune"], [], None, None),
    "nothing is derived": (["prepare", "pretrain", "evaluate"], [], None, None),
}


@pytest.mark.parametrize("case", CHAINS)
def test_the_model_that_others_are_compared_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    stages, folders, teacher, expected = CHAINS[case]
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, folders):
        folder.mkdir(parents=True)
        Artifact("import", folder, "0000").write()
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


def test_a_stage_beyond_its_limits_leaves_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = {
        **TINY,
        "run": {"output_dir": str(tmp_path / "run"), "stages": ["prepare", "pretrain", "prune", "export"]},
        "train": {**TINY["train"], "train_iters": 1, "eval_iters": 1},
        "prune": {"method": "magnitude"},
        "quality": {"tokens": 64, "shapes": [[1, 1]], "rounds": 1, "limits": {"prune": {"max_kl": 1.0e-9}}},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert cli.main(["run", "-c", str(path)]) == 1
    told, run = capsys.readouterr(), tmp_path / "run"
    assert "prune: kl is" in told.err and not (run / "prune" / "manifest.json").exists()
    rows = json.loads((run / "quality.json").read_text())
    assert [(row["name"], row["passed"]) for row in rows] == [("pretrain", True), ("prune", False)]
    assert rows[1]["kl"] > 1.0e-9 and rows[1]["sparsity"] == pytest.approx(0.5)
    assert "FAIL" in told.out and (run / "quality.svg").read_text().count("<circle") == 2
    measured = [line for line in told.out.splitlines() if "same likeliest token" in line]
    assert measured[0].startswith("pretrain: perplexity") and "beside" not in measured[0]
    assert measured[1].startswith("prune: perplexity") and "beside pretrain" in measured[1] and "KL" in measured[1]
