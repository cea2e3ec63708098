"""`evaluate` as a stage of a chain and as a command: whose figures stand in the run, and what is kept beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer import cli
from tests.recipes import TINY, python_sources
from tests.tracking.wandb_records import config, only_run

STAGES = ["prepare", "pretrain", "prune", "evaluate"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose chain, from text to the figures of a sparse model, has been run."""
    folder = tmp_path_factory.mktemp("evaluate")
    tree: dict[str, Any] = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run"), "stages": STAGES},
        "tokenizer": {"vocab_size": 400},
        "data": {"sources": python_sources("json")},
        "train": {**TINY["train"], "train_iters": 2, "eval_iters": 1},
        "checkpoint": {"save_interval": 1},
        "prune": {"method": "magnitude"},
        "quality": {"tokens": 64, "shapes": [[1, 1]], "rounds": 1},
        "generate": {"max_new_tokens": 4},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert cli.main(["run", "-c", str(path)]) == 0
    return path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, which a test may change."""
    shutil.copytree(made.parent / "run", tmp_path / "run")
    return tmp_path / "run"


def evaluate(made: Path, run: Path, *arguments: str, command: str = "evaluate") -> int:
    return cli.main([command, "-c", str(made), f"run.output_dir={run}", *arguments])


def manifest(run: Path, stage: str = "evaluate") -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())  # type: ignore[no-any-return]


def test_the_figures_of_another_model_are_not_written_over_the_chains(made: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = manifest(run)
    assert evaluate(made, run, "--from", str(run / "pretrain")) == 0
    told = capsys.readouterr().out
    assert "bits/byte" in told and f"not written: {run / 'evaluate'} holds the figures of another model" in told
    assert manifest(run) == before and before["parents"]["prune"] == manifest(run, "prune")["identity"]


def test_an_earlier_step_of_the_same_stage_is_another_model(made: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "evaluate")
    assert evaluate(made, run, "--from", str(run / "pretrain")) == 0
    assert manifest(run)["metrics"]["checkpoint"] == "step_00000002", "there was none: it is kept"
    assert evaluate(made, run, "--from", str(run / "pretrain" / "checkpoints" / "step_00000001")) == 0
    assert "not written" in capsys.readouterr().out
    assert manifest(run)["metrics"]["checkpoint"] == "step_00000002"
    assert evaluate(made, run, command="run") == 0
    assert "prune" in manifest(run)["parents"], "the chain's own takes their place"


def test_the_folder_says_with_what_it_was_made(made: Path, run: Path) -> None:
    recipe = yaml.safe_load((run / "evaluate" / "config.yaml").read_text())
    assert recipe["generate"]["max_new_tokens"] == 4 and recipe["model"]["hidden_size"] == TINY["model"]["hidden_size"]


def test_a_sample_drawn_otherwise_is_another_result_and_recorded(made: Path, run: Path) -> None:
    before = {stage: manifest(run, stage) for stage in STAGES}
    assert evaluate(made, run, "tracking.wandb.mode=offline", "generate.max_new_tokens=3", command="run") == 0
    after = {stage: manifest(run, stage) for stage in STAGES}
    assert [stage for stage in STAGES if after[stage] != before[stage]] == ["evaluate"]
    records = only_run(run / "evaluate")
    assert config(records)["recipe"]["generate"]["max_new_tokens"] == 3
    told = [(record.artifact.name, record.artifact.use_after_commit) for record in records if record.HasField("artifact")]
    assert ("tiny-evaluate", False) in told and ("tiny-prune", True) in told


def test_weights_that_are_not_finite_are_told_in_a_sentence(made: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = (run / "prune" / "checkpoints" / "step_00000000" / "weights").glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(raw[:8], "little")
    raw[header:] = b"\xff" * (len(raw) - header)  # NaN in each float
    file.write_bytes(raw)
    before = manifest(run)
    assert evaluate(made, run, "checkpoint.verify=size") == 1
    assert "the loss of step_00000000 on the test split is nan: weights or activations are not finite" in capsys.readouterr().err
    assert manifest(run) == before
