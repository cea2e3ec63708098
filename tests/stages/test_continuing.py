"""What a training that goes on takes over, and what it begins anew: its own, after an end in between, and another run's."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.stages.common import interruptions
from largeformer.training.checkpointing import Progress
from largeformer.training.rewind import read_rewinds
from tests.recipes import TINY

AT_ONCE = {"patience": 1, "min_delta": 1000.0}  # the second validation improves on nothing


def pretrain(run: Path, steps: int, load: Path | None = None, model: dict[str, Any] | None = None, **train: Any) -> int:
    tree = {
        **TINY,
        "model": {**TINY["model"], **(model or {})},
        "run": {"name": run.name, "output_dir": str(run)},
        "train": {**TINY["train"], "train_iters": steps, "eval_interval": 1, "eval_iters": 1, **train},
        "checkpoint": {"save_interval": 1, "load": None if load is None else str(load)},
        "tracking": {"wandb": {"mode": "offline"}, "tensorboard": False},
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return cli.main(["pretrain", "-c", str(path)])


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "pretrain" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())  # type: ignore[no-any-return]


def last_step(run: Path) -> int:
    made = Artifact.read(run / "pretrain")
    assert made is not None
    return int(made.metrics["steps"])


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("continuing") / "first"
    assert pretrain(run, 6, early_stopping=AT_ONCE) == 0
    assert last_step(run) == 2
    return run


def test_another_run_goes_on_under_a_record_and_with_a_patience_of_its_own(stopped_early: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "second", 6, stopped_early, early_stopping=AT_ONCE) == 0
    assert last_step(tmp_path / "second") == 4
    first, second = state(stopped_early, 2), state(tmp_path / "second", 4)
    assert first["wandb_run_id"] and second["wandb_run_id"] and first["wandb_run_id"] != second["wandb_run_id"]
    assert second["progress"]["samples"] == 16 and second["optimizer"]["steps"] == 4


def test_what_had_stopped_early_trains_no_further(stopped_early: Path) -> None:
    """Killed after its last checkpoint, and before it had finished."""
    (stopped_early / "pretrain" / "manifest.json").unlink()
    assert pretrain(stopped_early, 6, early_stopping=AT_ONCE) == 0
    assert last_step(stopped_early) == 2


def test_a_run_with_dropout_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """All of it: what is measured at the start of a process draws no random numbers of the training's."""
    found = []
    for name, stops in (("whole", [None]), ("halves", [2, None])):
        for stop in stops:
            assert pretrain(tmp_path / name, 4, model={"hidden_dropout": 0.1, "attention_dropout": 0.1}, exit_iteration=stop) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        found.append([row["val_loss"] for row in rows if "val_loss" in row])
    assert len(found[0]) == 4 and found[0] == found[1]


def test_a_checkpoint_beyond_the_end_is_refused(stopped_early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "short", 2, stopped_early) == 2
    assert "is of step 2, and train.train_iters is 2, which counts from 0: set it to more" in capsys.readouterr().err
    assert not (tmp_path / "short" / "pretrain" / "config.yaml").exists()


def test_a_run_that_goes_on_from_another_leaves_out_what_came_since(tmp_path: Path) -> None:
    """It has no checkpoint of its own yet."""
    world: Any = SimpleNamespace(from_main=lambda call: call())
    guards: Any = SimpleNamespace(spike=SimpleNamespace(step=520, end=8320, loss=9.0, z_score=30.0))
    interruptions.rewind(world, tmp_path, guards, Progress(step=500, samples=8000), 8 * 64)
    (made,) = read_rewinds(tmp_path)
    assert (made.step, made.first, made.end) == (500, 8000, 8320)
