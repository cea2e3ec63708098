"""Batch scripts: filled in from the shipped text, readable by bash, and taken or refused by sbatch in its own words."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from largeformer import cli
from largeformer.config.resources import batch_script
from largeformer.errors import BadInputError
from largeformer.launching.slurm import Job, fill_in, submit

ROOT = Path(__file__).parents[2]
SCRIPTS = ("pretrain", "pipeline", "array_sweep")


def directives(text: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, flags=re.MULTILINE))


def variables(text: str, *names: str) -> list[str]:
    """As bash reads them, in an empty environment."""
    script = "\n".join(line for line in text.splitlines() if line.split("=")[0] in names)
    show = "printf '%s\\0' " + " ".join(f'"${name}"' for name in names)
    done = subprocess.run(["bash", "-c", f"{script}\n{show}"], env={}, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_shipped_script_is_whole(name: str) -> None:
    text = batch_script(name)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    asked = directives(text)
    assert asked["signal"] == "USR1@120" and "#SBATCH --requeue\n" in text and asked["open-mode"] == "append"
    assert {"nodes", "time", "output"} <= asked.keys() and not {"partition", "account"} & asked.keys()


def test_what_is_asked_for_stands_in_the_script() -> None:
    job = Job("a run", 4, 8, 8, "2-00", cpus_per_task=6, partition="gpu", account="lab")
    odd = r"""a b'c"$HOME\1"""
    text = fill_in(batch_script("pretrain"), job, "runs/x y/%x-%j.log", {"RECIPE": odd, "OUTPUT_DIR": "runs/x y", "STAGE": "pretrain"})
    asked = directives(text)
    wanted = {"job-name": "a-run", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "2-00", "cpus-per-task": "6"}
    assert asked == {**asked, **wanted, "partition": "gpu", "account": "lab", "output": r"runs/x\ y/%x-%j.log"}
    assert variables(text, "RECIPE", "OUTPUT_DIR", "STAGE") == [odd, "runs/x y", "pretrain"]


def test_what_is_not_asked_for_is_left_to_the_cluster() -> None:
    asked = directives(fill_in(batch_script("pipeline"), Job("r", 1, 1), "log", {}))
    assert not {"gpus-per-node", "cpus-per-task", "partition", "account"} & asked.keys()


def test_scripts_requeue_alike() -> None:
    """Each is whole in itself, to be copied and edited; what they share is the same text."""

    def shared(name: str) -> str:
        return batch_script(name).partition("set -uo pipefail")[2].partition('\nbefore="')[0]

    assert shared("pretrain") == shared("pipeline")


def fake_sbatch(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = folder / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def test_submit_freezes_the_recipe_and_names_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sbatch(tmp_path, monkeypatch, f'printf "%s\\n" "$@" > {tmp_path}/arguments; echo "123;cluster"')
    out = tmp_path / "out"
    arguments = [
        "submit",
        "-c",
        "quickstart",
        "--nodes",
        "2",
        "--sbatch=--qos=high",
        f"run.output_dir={json.dumps(str(out))}",
        "run.seed=9",
    ]
    assert cli.main(arguments) == 0
    given = (tmp_path / "arguments").read_text().split()
    script = Path(given[-1])
    assert given[:-1] == ["--parsable", "--qos=high"] and script.parent == out / "slurm"
    recipe, folder = variables(script.read_text(), "RECIPE", "OUTPUT_DIR")
    assert yaml.safe_load(Path(recipe).read_text())["run"]["seed"] == 9 and folder == str(out)
    assert "job 123 is submitted" in capsys.readouterr().out
    # Submitted again it is the same script; another recipe does not replace the one that a waiting job will read.
    assert cli.main(arguments) == 0 and cli.main([*arguments, "optimizer.lr=0.5"]) == 0
    assert len([*(out / "slurm").glob("*.yaml")]) == 2


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert cli.main(["submit", "-c", "quickstart", "--dry-run", "--stage", "run", f"run.output_dir={tmp_path}/out"]) == 0
    out, err = capsys.readouterr()
    assert "largeformer run -c" in out and "nothing submitted" in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        pytest.param(
            "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1", "invalid partition specified: gpu", id="refused"
        ),
        pytest.param("exit 3", "exit code 3", id="says nothing"),
    ],
)
def test_a_refusal_is_told_in_slurms_words(body: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sbatch(tmp_path, monkeypatch, body)
    with pytest.raises(BadInputError, match="sbatch did not take") as caught:
        submit(Path("s.sbatch"))
    assert sentence in str(caught.value)


def test_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadInputError, match="sbatch is not on PATH"):
        submit(Path("s.sbatch"))
