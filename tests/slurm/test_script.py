"""The batch script on a real SLURM cluster of two nodes, with ranks that save nothing: who is told, who requeues, where the logs are.

`test_requeue.py` has real ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from largeformer.config.resources import batch_script
from largeformer.launching.slurm import Job, fill_in
from tests.slurm.cluster import Cluster, missing

pytestmark = pytest.mark.slow
# A rank as the script sees it: at the signal rank 0 says so in status.json, and each ends with 75. In its second life it finishes.
_RANK = """#!/bin/bash
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS at $MASTER_ADDR: $*"
say() { [ "$SLURM_PROCID" != 0 ] || echo "{\\"status\\": \\"$1\\", \\"restart\\": \\"${SLURM_RESTART_COUNT:-0}\\"}" > FOLDER/status.json; }
trap 'say requeue; exit 75' USR1
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then say finished; exit 0; fi
touch FOLDER/ready$SLURM_PROCID
while :; do read -rt 1 <> <(:); done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_a_signal_reaches_the_ranks_and_the_job_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    rank = tmp_path / "bin" / "python"
    rank.parent.mkdir()
    rank.write_text(_RANK.replace("FOLDER", str(tmp_path)))
    rank.chmod(0o755)
    script = tmp_path / "job.sbatch"
    variables = {"RECIPE": "r.yaml", "OUTPUT_DIR": str(tmp_path), "VENV": ""}
    script.write_text(fill_in(batch_script("pretrain"), Job("r", 2, 1, time="60"), str(tmp_path / "job.log"), variables))
    path = f"{rank.parent}{os.pathsep}{cluster.environ['PATH']}"
    job = cluster.run("sbatch", "--parsable", str(script), PATH=path).strip()
    cluster.wait(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)), "both ranks")
    cluster.run("scancel", "--signal=USR1", job)
    cluster.requeued(job, 1)
    cluster.wait(lambda: cluster.job(job)["JobState"] not in ("RUNNING", "COMPLETING"), "the end")
    assert cluster.job(job)["JobState"] == "COMPLETED", (tmp_path / "job.log").read_text()
    assert cluster.job(job)["Restarts"] == "1"
    assert (tmp_path / "job.log").read_text().count("is saved and requeued") == 1
    for number in range(2):
        told = f"rank {number} of 2 at 0x7f000002: -m largeformer pretrain -c r.yaml run.output_dir='{tmp_path}'\n"
        assert (tmp_path / "logs" / f"{job}-{number}.log").read_text().count(told) == 2
