"""A stage of the chain goes under its entry's name, in `status.json` and towards those who report when it stops or hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largeformer import cli
from largeformer.artifact import read_status
from largeformer.stages.common import interruptions
from tests.stages.test_prune import write_recipe

GRADUAL = {"method": "magnitude", "schedule": {"start": 0, "end": 1}}
FEW: dict[str, Any] = {
    "distill": {"student": {"init": "teacher_layers", "model": {"num_layers": 2}}},
    "quantize": {"calibration": {"samples": 2}, "evaluation_tokens": 64},
    "export": {"gate_tokens": 64},
}
STAGES: dict[str, tuple[dict[str, Any], bool]] = {
    "prune at once": ({"prune": {"name": "prune-2"}}, False),
    "prune, gradually": ({"prune": {"name": "prune-2", **GRADUAL}}, True),
    "distill": ({"distill": {"name": "distill-2"}}, True),
    "quantize": ({"quantize": {"name": "quantize-2"}}, False),
    "quantize, trained": ({"quantize": {"name": "quantize-2", "method": "qat"}}, True),
    "export": ({"export": {"name": "export-2", "formats": ["largeformer"]}}, False),
}
LONG = ("quantize, trained",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    assert cli.main(["run", "-c", str(write_recipe(folder))]) == 0
    return folder


@pytest.mark.parametrize(
    ("entry", "trains"), [pytest.param(*case, id=name, marks=pytest.mark.slow if name in LONG else ()) for name, case in STAGES.items()]
)
def test_a_stage_goes_under_the_name_of_its_entry(
    entry: dict[str, Any], trains: bool, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    for name in ("announcer", "hanging"):
        original: Callable[..., Any] = getattr(interruptions, name)

        def seen(recipe: Any, stage: str, original: Callable[..., Any] = original) -> Any:
            told.append(stage)
            return original(recipe, stage)

        monkeypatch.setattr(interruptions, name, seen)
    ((stage, settings),) = entry.items()
    recipe = write_recipe(trained, run={"output_dir": str(trained / "run"), "stages": ["prepare", "pretrain", entry]}, **FEW)
    assert cli.main([stage, "-c", str(recipe), "--fresh"]) == 0
    status = read_status(trained / "run")
    assert status is not None and (status["status"], status["stage"]) == ("finished", settings["name"])
    assert told == ([settings["name"]] * 2 if trains else [])
