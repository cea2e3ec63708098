"""Preempted on a real SLURM cluster of two nodes: saved, requeued, gone on with, and nobody could tell from the record.

python -m pytest -m slow tests/slurm
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer.launching.local import free_port, rank_environ
from tests.recipes import TINY
from tests.slurm.cluster import Cluster, missing
from tests.tracking.wandb_records import header, history, runs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
STEPS = 500  # SLURM looks at time limits every half minute: the steps take longer than that


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def recipe(folder: Path, name: str, steps: int) -> Path:
    tree: dict[str, Any] = {
        **TINY,
        "model": {**TINY["model"], "num_layers": 2},
        "run": {"name": name, "output_dir": str(folder / name)},
        "train": {**TINY["train"], "global_batch_size": 64, "train_iters": steps, "eval_interval": 10 * steps, "eval_iters": 1},
        "checkpoint": {"save_interval": 10 * steps},
        "tracking": {"wandb": {"mode": "offline"}, "tensorboard": False},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def uninterrupted(path: Path) -> None:
    """The same recipe on two ranks that nobody stops."""
    port = free_port()
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "largeformer", "pretrain", "-c", str(path)]
    ranks = [subprocess.Popen(command, cwd=ROOT, env=rank_environ(base, rank, 2, port), stdout=subprocess.DEVNULL) for rank in range(2)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()


def submit(cluster: Cluster, path: Path, *options: str) -> str:
    """`largeformer submit`, as typed on a login node; the number of the job."""
    command = [sys.executable, "-m", "largeformer", "submit", "-c", str(path), "--nodes", "2", *options]
    environ = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    said = cluster.run(*command, **environ)
    assert "2 nodes, 2 ranks" in said, said
    return said.split()[1]


def rows(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    path = folder / "pretrain" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(folder) if "loss" in row]


def said(folder: Path) -> str:
    logs = [*folder.glob("slurm/*.log"), *folder.glob("logs/*.log")]
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in logs)


def test_stopped_twice_it_is_one_run(cluster: Cluster, tmp_path: Path) -> None:
    """By `scancel --signal` first, by the time limit itself then; to the bit as if it never had been, and one W&B run."""
    path, whole = recipe(tmp_path, "stopped", STEPS), recipe(tmp_path, "whole", STEPS)
    folder = tmp_path / "stopped"
    job = submit(cluster, path, "--time", "60")
    cluster.wait(lambda: len(losses(folder)) > 20, "a few steps")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.requeued(job, 1)
    reached = losses(folder)[-1][0]
    assert 20 < reached < STEPS, said(folder)
    cluster.wait(lambda: losses(folder)[-1][0] > reached + 20, "some steps more")
    # What is left is now between one and two minutes: less than the two before the limit at which the script asks for the signal, and
    # more than the half minute after which SLURM looks again.
    hours, minutes, _ = cluster.job(job)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    cluster.requeued(job, 2)
    with contextlib.suppress(AssertionError):  # the few steps that are left may be done by now
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "the end")
    assert cluster.job(job)["JobState"] == "COMPLETED", said(folder)

    stops = [(event["step"], event["reason"]) for event in rows(folder, "events") if event["event"] == "requeue"]
    assert len(stops) == 2 and stops[0][0] == reached < stops[1][0] < STEPS and "USR1" in stops[1][1]
    uninterrupted(whole)
    assert losses(folder) == losses(tmp_path / "whole") and len(losses(folder)) == STEPS

    recorded = runs(folder / "pretrain", "offline-run")
    assert len(recorded) == 3 and len({header(run).run_id for run in recorded}) == 1
    logged = [row["step"] for run in recorded for row in history(run) if "train/loss" in row]
    assert logged == [*range(1, STEPS + 1)]
    assert sorted(file.name for file in (folder / "logs").iterdir()) == [f"{job}-0.log", f"{job}-1.log"]
