"""What `lineage` draws of manifests in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from largeformer.artifact import Artifact, write_status
from largeformer.errors import BadInputError
from largeformer.stages.lineage import nodes, run

CHAIN: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "prepare": ("p", {}, {}),
    "pretrain": ("t", {"prepare": "p"}, {"val_loss": 2.5, "outcome": "finished"}),
    "aside": ("r", {"prepare": "p", "pretrain": "t"}, {"parameters": 8_500_000}),
    "distill": ("d", {"prepare": "p", "prune": "r", "teacher": "t"}, {}),
    "distill-2": ("d2", {"prepare": "p", "distill": "d", "teacher": "elsewhere"}, {}),
}


def made(folder: Path, chain: dict[str, Any] | None = None) -> Path:
    for name, (identity, parents, metrics) in (CHAIN if chain is None else chain).items():
        Artifact(name.removesuffix("-2"), folder / name, identity, parents, metrics).write()
    return folder


def test_each_stands_below_the_one_it_was_made_from(tmp_path: Path) -> None:
    found = {node.name: node for node in nodes(made(tmp_path))}
    assert list(found) == ["prepare", "pretrain", "aside", "distill", "distill-2"]
    assert {name: node.below for name, node in found.items()} == {
        "prepare": None,
        "pretrain": "prepare",
        "aside": "pretrain",
        "distill": "aside",
        "distill-2": "distill",
    }
    assert found["distill"].others == ("prepare", "pretrain")
    assert found["distill-2"].others == ("prepare", "teacher elsewhere")


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path)
    (tmp_path / "prune.old-1").mkdir()
    Artifact("prune", tmp_path / "prune.old-1", "x", {"pretrain": "t"}).write()
    assert run(tmp_path) == 0
    told = capsys.readouterr().out
    assert "validation loss 2.5000" in told and "8,500,000 parameters" in told
    assert "also made from pretrain" in told and "also made from teacher elsewhere" in told
    assert "distill-2  d2  (distill)" in told
    assert "old-1" not in told
    assert [line.index("pretrain") > line.index("─") for line in told.splitlines() if "pretrain  t" in line] == [True]
    assert run(tmp_path, as_json=True) == 0
    assert {row["name"]: row["parents"] for row in json.loads(capsys.readouterr().out)["artifacts"]}["distill"]["teacher"] == "t"


@pytest.mark.parametrize("error", ["KeyError: [/foo]", "[red]", "no room"])
def test_what_became_of_it_is_told_as_it_is(tmp_path: Path, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_status(made(tmp_path / "exp[/1]"), "failed", stage="distill", error=error)
    assert run(tmp_path / "exp[/1]") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"failed in distill: {error}"


@pytest.mark.parametrize("there", [pytest.param(False, id="no folder"), pytest.param(True, id="nothing finished")])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "run"
    if there:
        (folder / "pretrain").mkdir(parents=True)
    with pytest.raises(BadInputError, match="name a run's output folder"):
        run(folder)
