"""Runs that are stopped, hang, or lose a rank: real processes, with a fault at a place that is the same each time (tests/faulty.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer.launching.local import free_port, rank_environ
from tests.commands import run_command
from tests.recipes import TINY

ROOT = Path(__file__).parents[2]
STEPS = 8
FORWARD = "largeformer.training.engine forward_loss"
SAVE = "largeformer.training.saving write_contents"
VALIDATE = "largeformer.evaluation.perplexity evaluate"


@dataclass(frozen=True)
class Ended:
    """How a launched run ended: a code a process, and what was said on standard error."""

    codes: list[int]
    errors: list[str]


def recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """Two layers, two micro batches of two in a step of a lone rank; mock data unless said."""
    tree: dict[str, Any] = {
        **TINY,
        "model": {**TINY["model"], "num_layers": 2},
        "run": {"output_dir": str(folder / "run")},
        "train": {**TINY["train"], "global_batch_size": 8, "train_iters": STEPS, "eval_interval": 100, "eval_iters": 1},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def launch(path: Path, *arguments: str, ranks: int = 2, faults: str = "", command: str = "pretrain", timeout: float = 240) -> Ended:
    """Every rank a process of its own, with nobody above them."""
    base = {"FAULTS": faults, "OMP_NUM_THREADS": "1"}
    ended = run_command(command, "-c", str(path), *arguments, ranks=ranks, module="tests.faulty", environ=base, timeout=timeout)
    return Ended([one.returncode for one in ended], [one.stderr for one in ended])


def launch_programs(path: Path, faults: str, timeout: float = 240) -> Ended:
    """`launch`, each rank importing everything itself."""
    port = free_port()
    base = {**os.environ, "FAULTS": faults, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.faulty", "pretrain", "-c", str(path)],
            cwd=ROOT,
            env=rank_environ(base, rank, 2, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return Ended([process.returncode for process in processes], errors)


def status(path: Path) -> dict[str, Any]:
    return json.loads((path.parent / "run" / "status.json").read_text())  # type: ignore[no-any-return]


def events(path: Path) -> list[dict[str, Any]]:
    return _lines(path.parent / "run" / "pretrain" / "events.jsonl")


def steps(path: Path) -> list[int]:
    return [row["step"] for row in _lines(path.parent / "run" / "pretrain" / "metrics.jsonl") if "loss" in row]


def checkpoints(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path.parent / "run" / "pretrain" / "checkpoints").glob("step_*"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_signal_to_one_rank_between_micro_batches_stops_all_at_that_step_and_the_run_goes_on(tmp_path: Path) -> None:
    """Rank 1 of DP2 gets two signals in its fourth forward, the second of step 2."""
    path = recipe(tmp_path)
    stopped = launch(path, faults=f"1 {FORWARD} 4 SIGTERM+SIGUSR1")
    assert stopped.codes == [75, 75], stopped.errors
    assert status(path)["status"] == "requeue" and "SIGTERM at step 2" in status(path)["reason"]
    assert checkpoints(path) == ["step_00000002"]
    assert [(event["event"], event["step"]) for event in events(path)] == [("saved", 2), ("requeue", 2)]
    assert 0 <= events(path)[-1]["seconds"] < 30
    assert "stopped by SIGTERM at step 2, saved; the same command goes on from here" in stopped.errors[0]

    ended = launch(path)
    assert ended.codes == [0, 0], ended.errors
    assert status(path)["status"] == "finished"
    assert steps(path) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_rank_that_sleeps_for_ever_is_seen_and_every_stack_written(tmp_path: Path) -> None:
    path = recipe(tmp_path, guards={"watchdog_timeout_s": 4.0})
    ended = launch(path, faults=f"1 {FORWARD} 4 sleep")
    assert ended.codes == [1, 1], ended.errors
    assert status(path)["status"] == "failed" and "no progress for" in status(path)["error"] and "step 2" in status(path)["error"]
    stacks = [(tmp_path / "run" / "pretrain" / "stacks" / f"rank_{rank:05d}.txt").read_text() for rank in range(2)]
    assert " in act\n" in stacks[1] and " in act\n" not in stacks[0]
    assert all("train_step" in stack and "no progress" in stack for stack in stacks)


@pytest.mark.slow
def test_a_dead_rank_0_does_not_leave_a_running_status_behind(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    ended = launch(path, faults=f"0 {FORWARD} 4 SIGKILL")
    assert ended.codes == [-signal.SIGKILL, 1]
    assert status(path)["status"] == "failed" and status(path)["error"].startswith("rank 1: ")


@pytest.mark.slow
def test_a_spike_is_left_out_once_and_for_good(tmp_path: Path) -> None:
    """Samples 120 to 127, of step 16, make a loss 50 times as high. The run goes back to step 12 and leaves out all from there; it
    is killed at once, and the next one knows."""
    path = recipe(
        tmp_path,
        train={"train_iters": 20},
        checkpoint={"save_interval": 4},
        guards={"spike_action": "rewind", "rewind_steps": 8},
    )
    spike = f"0 {FORWARD} 1 spike:120-127"
    # 2 micro batches of 2... 4 forwards a step: the second forward after the rewind is number 4 * 16 + 2.
    killed = launch(path, ranks=1, faults=f"{spike};0 {FORWARD} 66 SIGKILL")
    assert killed.codes == [-signal.SIGKILL]
    left_out = json.loads((tmp_path / "run" / "pretrain" / "left_out.json").read_text())
    assert [(made["step"], made["spike_step"], made["first"], made["end"]) for made in left_out] == [(12, 16, 96, 128)]
    assert left_out[0]["z_score"] > 10
    assert ("rewound", 12) in [(event["event"], event["step"]) for event in events(path)]

    ended = launch(path, ranks=1, faults=spike)
    assert ended.codes == [0], ended.errors
    assert len(json.loads((tmp_path / "run" / "pretrain" / "left_out.json").read_text())) == 1
    assert "spike" not in [event["event"] for event in events(path)]
    assert steps(path) == list(range(1, 21))
    samples = [row["samples"] for row in _lines(tmp_path / "run" / "pretrain" / "metrics.jsonl") if "loss" in row]
    assert samples[11:14] == [96, 128 + 8, 128 + 16]


# Which rank gets the signal where, the text to prepare, the code, the status and the checkpoints that are there then
PHASES: dict[str, tuple[str, bool, list[int], str, list[str]]] = {
    "while torch is imported": ("1 torch import 1 SIGTERM", False, [75, 75], "requeue", []),
    "while text is prepared": ("0 largeformer.stages.prepare_folder Preparation._encode 1 SIGTERM", True, [75, 75], "requeue", []),
    "while others prepare": ("1 largeformer.stages.prepare wait_or_load 1 SIGUSR1", True, [75, 75], "requeue", []),
    "while the model is built": ("0 largeformer.models.gpt build_gpt 1 SIGUSR1", False, [75, 75], "requeue", []),
    "in the first step": (f"0 {FORWARD} 1 SIGTERM", False, [75, 75], "requeue", ["step_00000001"]),
    "while validating": (f"1 {VALIDATE} 1 SIGTERM", False, [75, 75], "requeue", ["step_00000003"]),
    "while saving": (f"1 {SAVE} 1 SIGTERM", False, [75, 75], "requeue", ["step_00000004", "step_00000005"]),
    "in the last save": (f"1 {SAVE} 3 SIGTERM", False, [0, 0], "finished", ["step_00000004", "step_00000008"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase(tmp_path: Path, phase: str) -> None:
    faults, text, codes, told, there = PHASES[phase]
    sources = [{"path": str(Path(json.__file__).parent.parent / name / "*.py")} for name in ("json", "email")]
    data: dict[str, Any] = {"sources": sources, "split": "80,10,10"} if text else {}
    path = recipe(
        tmp_path,
        data=data,
        tokenizer={"vocab_size": 500},
        train={"eval_interval": 3},
        checkpoint={"save_interval": 4},
    )
    ended = launch_programs(path, faults) if "import" in faults else launch(path, faults=faults)
    assert ended.codes == codes, ended.errors
    assert status(path)["status"] == told
    assert [name for name in checkpoints(path)] == there
    if told == "requeue":
        assert launch(path).codes == [0, 0]
        assert steps(path) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_signal_while_text_is_prepared_by_a_command_of_its_own(tmp_path: Path) -> None:
    text = {"sources": [{"path": str(Path(json.__file__).parent / "*.py")}], "split": "80,10,10"}
    path = recipe(tmp_path, data=text, tokenizer={"vocab_size": 500})
    ended = launch(path, ranks=1, command="prepare", faults="0 largeformer.stages.prepare_folder Preparation._encode 1 SIGUSR1")
    assert ended.codes == [75], ended.errors
    assert status(path)["status"] == "requeue"
    assert launch(path, ranks=1, command="prepare").codes == [0]
    assert status(path)["status"] == "finished"


@pytest.mark.slow
def test_a_signal_while_one_rank_exports_and_the_other_waits(tmp_path: Path) -> None:
    path = recipe(tmp_path, run={"stages": ["prepare", "pretrain", "export"]}, export={"formats": ["largeformer"], "gate_tokens": 256})
    ended = launch(path, command="run", faults="0 largeformer.stages.export _write_and_compare 1 SIGTERM")
    assert ended.codes == [75, 75], ended.errors
    assert (status(path)["status"], status(path)["stage"]) == ("requeue", "export")
    assert launch(path, command="run").codes == [0, 0]
    assert (path.parent / "run" / "export" / "manifest.json").exists()


@pytest.mark.slow
def test_a_rank_that_hangs_with_the_interpreter_locked_is_ended_too(tmp_path: Path) -> None:
    """No thread of Python can run on rank 1: its timer in C goes off instead."""
    path = recipe(tmp_path, guards={"watchdog_timeout_s": 4.0})
    ended = launch(path, faults=f"1 {FORWARD} 4 hang")
    assert ended.codes == [1, 1], ended.errors
    assert " in act\n" in (tmp_path / "run" / "pretrain" / "stacks" / "rank_00001.txt").read_text()
    assert status(path)["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", [f"{SAVE} 1", f"{FORWARD} 1", "largeformer.stages.common.training plan_errors 1"], ids=["saving", "compiling", "figures"]
)
def test_the_watchdog_is_patient_where_work_takes_long(tmp_path: Path, where: str) -> None:
    """A phase six times as long as the watchdog's limit, on one rank. (Of a validation each batch is progress.)"""
    path = recipe(tmp_path, guards={"watchdog_timeout_s": 1.0}, train={"eval_interval": 2, "eval_iters": 2, "train_iters": 3})
    ended = launch(path, ranks=1, faults=f"0 {where} pause:6")
    assert ended.codes == [0], ended.errors
    assert not (tmp_path / "run" / "pretrain" / "stacks").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "run"])
def test_a_run_killed_before_it_had_saved_says_so_next_time(tmp_path: Path, command: str) -> None:
    path = recipe(tmp_path, checkpoint={"save_interval": 2})
    killed = launch(path, ranks=1, faults=f"0 {FORWARD} 9 SIGTERM;0 {SAVE} 2 SIGKILL")
    assert killed.codes == [-signal.SIGKILL]
    assert status(path) == {**status(path), "status": "running", "stopping": "SIGTERM"}
    assert launch(path, "run.stages=[prepare, pretrain]", ranks=1, command=command).codes == [0]
    told = [event for event in events(path) if event["event"] == "cut short"]
    assert [event["step"] for event in told] == [2] and "SIGTERM" in told[0]["reason"]


@pytest.mark.slow
def test_time_is_up(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    ended = launch(path, "train.exit_duration_minutes=1e-6")
    assert ended.codes == [75, 75]
    assert status(path)["status"] == "requeue" and "exit_duration_minutes" in status(path)["reason"]
    assert checkpoints(path) == ["step_00000001"]


LAUNCHERS = {
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "{port}", "--module", "tests.faulty"],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}", "-m", "tests.faulty"],
}


@pytest.mark.slow
@pytest.mark.parametrize("action", ["SIGTERM", "SIGUSR1", "parent:SIGTERM"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_swallows_the_code_but_not_the_save(tmp_path: Path, launcher: str, action: str) -> None:
    """The signal comes to rank 1, or to the launcher's process above it, which passes it on."""
    path = recipe(tmp_path, train={"train_iters": 400})
    prefix = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    ended = subprocess.run(
        [sys.executable, *prefix, "pretrain", "-c", str(path)],
        cwd=ROOT,
        env={**os.environ, "FAULTS": f"1 {FORWARD} 4 {action}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    # DeepSpeed's launcher ends with the code of the first rank that failed, if it ends by itself.
    assert ended.returncode == (75 if launcher == "deepspeed" and not action.startswith("parent:") else 1), ended.stderr[-2000:]
    found = re.fullmatch(r"stopped by (SIG\w+) at step (\d+), saved", status(path)["reason"])
    assert status(path)["status"] == "requeue" and found is not None
    assert found[1] == action.removeprefix("parent:")
    assert checkpoints(path) == [f"step_{int(found[2]):08d}"]
    assert found[2] == "2" or action.startswith("parent:")
