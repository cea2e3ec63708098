"""A trial of a W&B sweep: the command that W&B's own agent makes of `launch/sweep.yaml`, run as the agent runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from wandb import wandb_agent

from largeformer.tracking.build import build_trackers
from tests.tracking.test_tracker import QUIET

ROOT = Path(__file__).parents[2]
TRIAL = {"optimizer.lr": 0.0005, "optimizer.weight_decay": 0.0, "train.global_batch_size": 32}


def agent_command(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Command and environment of the trial `TRIAL`, from the agent's own code."""
    started: dict[str, Any] = {}

    def process(**arguments: Any) -> SimpleNamespace:
        started.update(arguments)
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", process)
    for name, value in (("WANDB_DIR", str(folder)), ("WANDB_SWEEP_ID", "sweep1"), ("WANDB_RUN_ID", ""), ("WANDB_SWEEP_PARAM_PATH", "")):
        monkeypatch.setenv(name, value)
    sweep = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text())
    assert {*TRIAL} == {*sweep["parameters"]}
    agent = wandb_agent.Agent.__new__(wandb_agent.Agent)
    quiet = {"_function": None, "_sweep_command": sweep["command"], "_run_processes": {}, "_forward_signals": False, "_in_jupyter": False}
    vars(agent).update({**quiet, "_api": None, "_sweep_id": "sweep1"})
    arguments = {name: {"value": value} for name, value in TRIAL.items()}
    agent._command_run({"run_id": "trial1", "program": None, "args": arguments, "type": "run"})
    return started["command"], started["env"]


def test_a_trial_changes_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command, environ = agent_command(monkeypatch, tmp_path)
    command[command.index("python")] = sys.executable
    done = subprocess.run([*command, "--dry-run"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    recipe = yaml.safe_load(done.stdout.partition("# Layout")[0])
    assert (recipe["optimizer"]["lr"], recipe["optimizer"]["weight_decay"], recipe["train"]["global_batch_size"]) == (0.0005, 0.0, 32)
    assert (recipe["run"]["output_dir"], recipe["tracking"]["wandb"]["mode"]) == ("runs/sweep/trial1", "online")


def test_a_trial_is_the_run_that_the_agent_has_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracking = QUIET.model_copy(update={"wandb": QUIET.wandb.model_copy(update={"mode": "offline"})})
    started: list[str] = []
    monkeypatch.setattr("largeformer.tracking.build._wandb", lambda *arguments: started.append(arguments[4]) or SimpleNamespace())
    for sweep, kept, wanted in (("sweep1", None, "trial1"), ("sweep1", "before", "before"), (None, None, None)):
        monkeypatch.setenv("WANDB_RUN_ID", "trial1")
        monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
        if sweep:
            monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
        trackers = build_trackers(tracking, tmp_path, "r", {}, 0, 1, wandb_run_id=kept)
        assert trackers.wandb_run_id == started[-1]
        assert (started[-1] == wanted) if wanted else (started[-1] not in ("trial1", "before"))
    assert os.environ["WANDB_RUN_ID"] == "trial1"
