"""Which model the others of a chain are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from largeformer.stages.quality import first_model, is_judged
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
