"""What the batch scripts do when their ranks end: run by bash, with stand-ins for srun and scontrol. tests/slurm has the real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from largeformer.config.source import apply_overrides

ROOT = Path(__file__).parents[2]
_SRUN = """#!/bin/bash
echo "srun $*" >> calls
while [[ "$1" == -* ]]; do shift; done
[[ " $* " == *" prepare "* ]] && [ -z "$IN_PREPARE" ] && exit 0
if [ -n "$SAYS" ]; then
    mkdir -p "$WHERE"; echo "{\\"status\\": \\"$SAYS\\", \\"time\\": 2${WHY:+, \\"reason\\": \\"$WHY\\"}}" > "$WHERE/status.json"
fi
exit "$CODE"
"""
_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo node7; echo node8; else echo "scontrol $*" >> calls; fi
"""
JOB = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
TASK = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "node7", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}


def run(script: str, folder: Path, srun: str = _SRUN, **environ: str) -> tuple[int, list[str], str]:
    """Exit code, what was called, and what was said."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", srun), ("scontrol", _SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    told = {"PATH": path, "VENV": "", "OUTPUT_DIR": "out", "WHERE": "out", "CODE": "0", "SAYS": "", "IN_PREPARE": "", **environ}
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm" / f"{script}.sbatch"], cwd=folder, env=told, capture_output=True, text=True, timeout=60
    )
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stdout + done.stderr


ENDS = {
    "stopped by a signal": ("75", "requeue", {}, True),
    "stopped, and the launcher swallowed the code": ("1", "requeue", {}, True),
    "finished": ("0", "finished", {}, False),
    "asked to stop at an iteration": ("0", "requeue", {}, False),
    "failed": ("1", "failed", {}, False),
    "bad input, beside what an earlier job left": ("2", "", {}, False),
    "stopped again and again": ("75", "requeue", {"SLURM_RESTART_COUNT": "100"}, False),
}


@pytest.mark.parametrize("script", ["pretrain", "pipeline"])
@pytest.mark.parametrize(("code", "says", "more", "requeues"), ENDS.values(), ids=ENDS)
def test_a_job_is_requeued_once_and_only_where_it_has_saved(
    script: str, code: str, says: str, more: dict[str, str], requeues: bool, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "status.json").write_text(json.dumps({"status": "requeue", "time": 1}))
    ended, calls, said = run(script, tmp_path, CODE=code, SAYS=says, **JOB, **more)
    assert ended == int(code), said
    assert [call for call in calls if call.startswith("scontrol")] == (["scontrol requeue 9"] if requeues else [])


def test_a_job_that_is_stopped_while_it_prepares_is_requeued(tmp_path: Path) -> None:
    ended, calls, said = run("pipeline", tmp_path, CODE="75", SAYS="requeue", IN_PREPARE="1", **JOB)
    assert ended == 75, said
    assert [call.split()[0] for call in calls] == ["srun", "scontrol"] and calls[1] == "scontrol requeue 9"


@pytest.mark.parametrize(("code", "says", "more", "requeues"), ENDS.values(), ids=ENDS)
def test_a_trial_requeues_its_own_task(code: str, says: str, more: dict[str, str], requeues: bool, tmp_path: Path) -> None:
    """Whatever the code: W&B's agent ends with 0."""
    ended, calls, said = run(
        "array_sweep", tmp_path, SWEEP="e/p/s", SAYS=says, WHY="" if code == "0" else "USR1", WHERE="out/9_3/t1", **TASK, **more
    )
    assert ended == 0, said
    assert calls[0].startswith("srun ") and any(call.endswith("-m wandb agent --count 1 e/p/s") for call in calls)
    assert [call for call in calls if call.startswith("scontrol")] == (["scontrol requeue 9_3"] if requeues else [])


def test_a_trial_that_was_stopped_goes_on_without_the_agent(tmp_path: Path) -> None:
    trial = tmp_path / "out" / "9_3" / "t1"
    (trial / "pretrain").mkdir(parents=True)
    (trial / "pretrain" / "config.yaml").write_text("")
    (trial / "status.json").write_text('{"status": "requeue", "time": 1}')
    _, calls, _ = run("array_sweep", tmp_path, SWEEP="e/p/s", SAYS="finished", WHERE="out/9_3/t1", **TASK)
    assert len(calls) == 1 and calls[0].endswith("-m largeformer pretrain -c out/9_3/t1/pretrain/config.yaml")


_TASK = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""
_AGENT = """#!/bin/bash
"$(dirname "$0")/largeformer-trial"
echo "the agent ends after its trial" >> calls
"""
# What SLURM does where it tracks processes by cgroup: the task has the signal, and nothing that it has started.
_TRIAL = f"""#!{sys.executable}
import os, signal
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
task = int(Path(f"/proc/{{os.getppid()}}/stat").read_text().rsplit(")", 1)[1].split()[1])
os.kill(task, signal.SIGUSR1)
signal.sigwait([signal.SIGUSR1])
with open("calls", "a") as calls:
    calls.write("the trial saves\\n")
"""


def test_a_trial_is_told_that_its_task_has_a_signal(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("python", _AGENT), ("largeformer-trial", _TRIAL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    ended, calls, said = run("array_sweep", tmp_path, srun=_TASK, SWEEP="e/p/s", **TASK)
    assert ended == 0 and calls == ["the trial saves", "the agent ends after its trial"], said


def test_how_ranks_are_started(tmp_path: Path) -> None:
    ended, calls, _ = run("pretrain", tmp_path, SLURM_CPUS_PER_TASK="6", RECIPE="r.yaml", PER_NODE="true", **JOB)
    assert ended == 0 and len(calls) == 2
    assert "--ntasks=2 --ntasks-per-node=1 bash -c true" in calls[0]
    assert calls[1].endswith("--output=out/logs/9-%t.log python -m largeformer pretrain -c r.yaml run.output_dir='out'")
    assert "--cpus-per-task=6 --kill-on-bad-exit=0 --wait=600" in calls[1]


ODD = {
    "a number": "20240501",
    "a list": "[a]/b",
    "a comment": "a #1",
    "quotes": """it's 'a' "b" """,
    "signs": r"a\1&$HOME: {b}, *",
    "null": "null",
}


@pytest.mark.parametrize("script", ["pretrain", "pipeline"])
@pytest.mark.parametrize("name", ODD.values(), ids=ODD)
def test_a_folder_is_read_as_it_is_named(script: str, name: str, tmp_path: Path) -> None:
    """By every command of the script, as the recipe's overrides are read."""
    ended, calls, said = run(script, tmp_path, OUTPUT_DIR=name, **JOB)
    commands = [call for call in calls if " -m largeformer " in call]
    assert ended == 0 and len(commands) == (1 if script == "pretrain" else 2), said
    for command in commands:
        given = "run.output_dir=" + command.partition(" run.output_dir=")[2]
        assert apply_overrides({}, [given]) == ({"run": {"output_dir": name}}, [])


IMAGES = {
    "pyxis": ("nvcr.io/x:1", "--container-image=nvcr.io/x:1 --container-mounts=MOUNTS "),
    "apptainer": ("x.sif", "apptainer exec --nv --bind MOUNTS x.sif "),
}


@pytest.mark.parametrize("script", ["pretrain", "pipeline", "array_sweep"])
@pytest.mark.parametrize(("image", "wanted"), IMAGES.values(), ids=IMAGES)
def test_a_container_sees_the_output_folder(script: str, image: str, wanted: str, tmp_path: Path) -> None:
    """Wherever it is: in the folder of the job, elsewhere, and behind a link."""
    work, away, link = tmp_path / "work", tmp_path / "away", tmp_path / "link"
    for folder in (work, away):
        folder.mkdir()
    link.symlink_to(away)
    seen = {"out": [work / "out"], str(away / "new"): [away / "new"], f"{link}/": [away, link]}
    for output, folders in seen.items():
        more = {"SWEEP": "e/p/s", **TASK} if script == "array_sweep" else JOB
        _, calls, said = run(script, work, CONTAINER=image, OUTPUT_DIR=output, **more)
        (work / "calls").unlink()
        mounts = [f"{work}:{work}", *(f"{folders[0]}:{folder}" for folder in folders)]
        assert wanted.replace("MOUNTS", ",".join(mounts)) in calls[0], (output, said)


@pytest.mark.parametrize(
    ("script", "environ", "sentence"),
    [
        pytest.param("pretrain", {"VENV": "nowhere"}, "VENV=nowhere is no virtual environment", id="no environment"),
        pytest.param("pipeline", {"OUTPUT_DIR": "/dev/null/x"}, "OUTPUT_DIR=/dev/null/x cannot be made", id="no output folder"),
        pytest.param("array_sweep", {}, "SWEEP is not set", id="no sweep"),
    ],
)
def test_bad_variables_end_with_2(script: str, environ: dict[str, str], sentence: str, tmp_path: Path) -> None:
    ended, calls, said = run(script, tmp_path, **(TASK if script == "array_sweep" else JOB), **environ)
    assert (ended, calls) == (2, []) and sentence in said
