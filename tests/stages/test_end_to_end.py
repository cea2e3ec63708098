"""Whole runs through the command line and the launchers, as a user starts them: real text, real processes, small models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer.launching.local import free_port
from tests.commands import run_command
from tests.recipes import TINY

STEPS = 6
ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "{port}", "--module", "largeformer"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}", "-m", "largeformer"],
}


def start(*arguments: str, launcher: str | None = None, ranks: int = 1, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`largeformer *arguments`, in this process's environment, under a launcher, on so many ranks or alone. Of several ranks the first
    one's output, and the first code that is not 0."""
    if launcher is None:
        first, *others = run_command(*arguments, ranks=ranks, timeout=timeout)
        first.returncode = next((one.returncode for one in (first, *others) if one.returncode), 0)
        return first
    prefix = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    return subprocess.run([sys.executable, *prefix, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()]


def status(run: Path) -> str:
    return str(json.loads((run / "status.json").read_text())["status"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over the sources of Python's `json` and `email` packages."""
    folder = tmp_path_factory.mktemp("end-to-end")
    sources = [{"path": str(Path(json.__file__).parent.parent / name / "*.py")} for name in ("json", "email")]
    tree = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run")},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": sources, "split": "80,10,10"},
        "train": {**TINY["train"], "train_iters": STEPS, "eval_interval": 3, "eval_iters": 1},
        "checkpoint": {"save_interval": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
        "generate": {"max_new_tokens": 6},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    """The run folder after `largeformer run`, stopped once on the way and started again."""
    run = recipe.parent / "run"
    stopped = start("run", "-c", str(recipe), "train.exit_iteration=3")
    assert stopped.returncode == 0, stopped.stderr
    assert status(run) == "requeue" and not (run / "pretrain" / "manifest.json").exists()
    again = start("run", "-c", str(recipe))
    assert again.returncode == 0, again.stderr
    return run


def test_a_run_that_was_stopped_goes_on_and_finishes(finished: Path) -> None:
    assert status(finished) == "finished"
    assert [row["step"] for row in rows(finished) if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(finished) if "val_loss" in row] == [3, STEPS]
    events = [json.loads(line)["event"] for line in (finished / "pretrain" / "events.jsonl").read_text().splitlines()]
    assert "resumed" in events and "saved" in events
    manifests = {stage: json.loads((finished / stage / "manifest.json").read_text()) for stage in ("prepare", "pretrain", "evaluate")}
    assert manifests["pretrain"]["parents"]["prepare"] == manifests["prepare"]["identity"]
    assert manifests["evaluate"]["parents"]["pretrain"] == manifests["pretrain"]["identity"]
    assert manifests["evaluate"]["metrics"]["tokens"] == manifests["prepare"]["metrics"]["test_tokens"]
    assert (finished / "pretrain" / "checkpoints" / "latest").read_text().strip() == f"step_{STEPS:08d}"


def test_a_finished_run_is_not_run_again(recipe: Path, finished: Path) -> None:
    before = (finished / "pretrain" / "metrics.jsonl").stat().st_mtime_ns
    again = start("run", "-c", str(recipe))
    assert again.returncode == 0 and "step 1/" not in again.stdout and "perplexity" not in again.stdout
    assert (finished / "pretrain" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow
def test_another_recipe_is_refused_and_fresh_sets_the_old_one_aside(recipe: Path, finished: Path, tmp_path: Path) -> None:
    refused = start("pretrain", "-c", str(recipe), "optimizer.lr=0.002")
    assert refused.returncode == 2
    assert "optimizer.lr was 0.001, is 0.002" in refused.stderr and "--fresh" in refused.stderr
    assert status(finished) == "failed"
    fresh = start("pretrain", "-c", str(recipe), "optimizer.lr=0.002", "train.exit_iteration=1", "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert (finished / "pretrain.old-1" / "manifest.json").exists()


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_launchers_train_the_same_at_tensor_parallel_2(recipe: Path, finished: Path, tmp_path: Path, launcher: str) -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true", "train.exit_iteration=2"]
    result = start("pretrain", "-c", str(recipe), f"run.output_dir={tmp_path}", *layout, launcher=launcher)
    assert result.returncode == 0, result.stderr[-2000:]
    old = finished / "pretrain.old-1"
    one = [json.loads(line) for line in ((old if old.exists() else finished / "pretrain") / "metrics.jsonl").read_text().splitlines()]
    for mine, theirs in zip(rows(tmp_path)[:2], one[:2], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.slow
def test_generation_is_the_same_from_another_layout(recipe: Path, finished: Path) -> None:
    arguments = ["generate", "--from", str(finished), "--prompt", "def load(", "--temperature", "0"]
    alone = start(*arguments)
    split = start(*arguments, "parallel.tensor_model_parallel_size=2", launcher="torchrun")
    assert alone.returncode == split.returncode == 0, alone.stderr + split.stderr
    assert alone.stdout.startswith("def load(")
    assert split.stdout == alone.stdout


@pytest.mark.slow
def test_bad_input_stops_a_launched_world_with_one_message(recipe: Path, tmp_path: Path) -> None:
    result = start("pretrain", "-c", str(recipe), f"run.output_dir={tmp_path}", "data.sources=[{path: nowhere.txt}]", launcher="torchrun")
    assert result.returncode != 0
    assert result.stderr.count("error: data.sources path 'nowhere.txt' does not exist") == 1
    assert status(tmp_path) == "failed"
