"""What a real run leaves in W&B's file: one run over a stop and a resume, with everything that a reader needs and nothing secret."""

from __future__ import annotations

import email
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import run_command
from tests.recipes import TINY
from tests.tracking.wandb_records import config, header, history, runs

ROOT = Path(__file__).parents[2]
STEPS, CANARY = 6, "canary-7d20e"


def pretrain(recipe: Path, *overrides: str) -> None:
    (done,) = run_command("pretrain", "-c", str(recipe), *overrides, environ={"SECRET_TOKEN": CANARY, "WANDB_API_KEY": CANARY * 4})
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    tree = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run")},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": [{"path": str(Path(email.__file__).parent / "*.py")}], "split": "80,10,10"},
        "train": {**TINY["train"], "train_iters": STEPS, "eval_interval": 2, "eval_iters": 1},
        "checkpoint": {"save_interval": 2},
        "tracking": {"sample_prompts": ["def load(", ""], "wandb": {"project": "p", "group": "g"}},
        "generate": {"max_new_tokens": 6},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def stage(recipe: Path) -> Path:
    """Stopped at step 3, resumed to the end."""
    pretrain(recipe, "train.exit_iteration=3")
    pretrain(recipe)
    return recipe.parent / "run" / "pretrain"


def rows(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


def test_one_run_with_one_history(stage: Path) -> None:
    processes = runs(stage)
    assert len({header(process).run_id for process in processes}) == 1 and len(processes) == 2
    (run_id,) = {json.loads(path.read_text())["wandb_run_id"] for path in stage.glob("checkpoints/step_*/state.json")}
    assert header(processes[0]).run_id == run_id
    logged = [row for process in processes for row in history(process)]
    wanted = [(row["step"], row["loss"], row["tokens"]) for row in rows(stage) if "loss" in row]
    assert [(row["step"], row["train/loss"], row["train/tokens"]) for row in logged if "train/loss" in row] == wanted
    assert [row["step"] for row in logged if "val/loss" in row] == [2, 4, 6]
    assert [wanted[i][0] for i in range(STEPS)] == list(range(1, STEPS + 1))


def test_the_config_says_what_was_run(stage: Path) -> None:
    first, second = (config(process) for process in runs(stage))
    assert {*first} == {"recipe", "layout", "deepspeed", "git", "versions"}
    assert first["recipe"]["train"]["exit_iteration"] == 3 and second["recipe"]["train"]["exit_iteration"] is None
    assert first["layout"]["world_size"] == 1 and first["deepspeed"]["train_batch_size"] == 4
    assert {"torch", "deepspeed", "megatron-core", "python"} <= {*first["versions"]}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    assert (first["git"] or {"commit": ""})["commit"] == head


def test_samples_and_artifacts(stage: Path) -> None:
    samples = [json.loads(line) for line in (stage / "events.jsonl").read_text().splitlines() if '"sample"' in line]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        (step, prompt) for step in (2, 4, 6) for prompt in ("def load(", "")
    ]
    assert all(isinstance(sample["text"], str) for sample in samples)
    tables = [json.loads(path.read_text())["data"] for path in stage.glob("wandb/*run-*/files/media/table/*.json")]
    assert [[sample["step"], sample["prompt"], sample["text"]] for sample in samples if sample["step"] > 2] in tables
    artifacts = [record.artifact for record in runs(stage)[1] if record.HasField("artifact")]  # tables too
    assert [(made.name, made.use_after_commit) for made in artifacts if made.name.startswith("tiny-")] == [
        ("tiny-prepare", True),
        ("tiny-pretrain", False),
    ]


@pytest.mark.slow
def test_drawing_samples_changes_nothing(stage: Path, recipe: Path) -> None:
    other = recipe.parent / "without"
    pretrain(recipe, f"run.output_dir={other}", "tracking={wandb: {mode: disabled}, tensorboard: false}")
    assert [row["loss"] for row in rows(other / "pretrain") if "loss" in row] == [row["loss"] for row in rows(stage) if "loss" in row]


def test_nothing_secret_is_in_any_file(stage: Path) -> None:
    files = [path for path in stage.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
