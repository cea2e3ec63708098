"""Launcher variables to rank and world. The SLURM tables are what slurmd 22.05 gives its tasks, recorded from a cluster of three
nodes: `sbatch -N 3 -n 5`, `srun -n 5` inside it, `salloc -N 2 -n 3`, and salloc with `use_interactive_step`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from largeformer.errors import BadInputError
from largeformer.parallel.environment import RankInfo, discover, first_host, to_environ

JOB = {
    "SLURM_JOB_ID": "2",
    "SLURM_JOB_NODELIST": "n[01-03]",
    "SLURM_NODELIST": "n[01-03]",
    "SLURM_NTASKS": "5",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
BATCH_SCRIPT = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_TASK_PID": "7121"}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "n[01-03]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
SALLOC_SHELL = {"SLURM_JOB_ID": "3", "SLURM_NTASKS": "3", "SLURM_TASKS_PER_NODE": "2,1"}
INTERACTIVE_STEP = SALLOC_SHELL | {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "n01",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
ALONE = RankInfo(0, 0, 1, 1, "127.0.0.1", 0, "none")


def task(rank: int, local: int, node: int) -> dict[str, str]:
    return STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != name}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        pytest.param({}, ALONE, id="nothing"),
        pytest.param({"WORLD_SIZE": "1"}, ALONE, id="a world of one, announced"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "1"}, ALONE, id="mpirun of one"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, RankInfo(0, 0, 1, 1, "127.0.0.1", 0, "environment"), id="rank 0 of 1"),
        pytest.param(TORCHRUN, RankInfo(5, 1, 8, 4, "gpu1", 29500, "torchrun"), id="torchrun"),
        pytest.param(DEEPSPEED, RankInfo(1, 1, 2, 2, "127.0.0.1", 29500, "deepspeed"), id="deepspeed"),
        pytest.param(
            {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1234"},
            RankInfo(1, 1, 2, 2, "a", 1234, "environment"),
            id="by hand, one machine",
        ),
        pytest.param(BATCH_SCRIPT, ALONE, id="sbatch script without srun"),
        pytest.param(SALLOC_SHELL, ALONE, id="salloc shell"),
        pytest.param(INTERACTIVE_STEP, RankInfo(0, 0, 1, 1, "127.0.0.1", 0, "slurm"), id="salloc, interactive step"),
        pytest.param(task(0, 0, 0), RankInfo(0, 0, 5, 2, "n01", 20032, "slurm"), id="srun, first task"),
        pytest.param(task(3, 1, 1), RankInfo(3, 1, 5, 2, "n01", 20032, "slurm"), id="srun, second node"),
        pytest.param(task(4, 0, 2), RankInfo(4, 0, 5, 1, "n01", 20032, "slurm"), id="srun, last node has one task"),
        pytest.param(
            task(4, 0, 2) | {"MASTER_ADDR": "ib0", "MASTER_PORT": "7000", "WORLD_SIZE": "5"},
            RankInfo(4, 0, 5, 1, "ib0", 7000, "slurm"),
            id="srun, address set by the script",
        ),
        pytest.param(
            task(1, 0, 1) | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[02-03]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            RankInfo(1, 0, 2, 1, "n02", 20032, "slurm"),
            id="a step on fewer nodes than its job",
        ),
        pytest.param(
            task(1, 0, 1) | {"SLURM_STEP_NUM_TASKS": "2"} | TORCHRUN,
            RankInfo(5, 1, 8, 4, "gpu1", 29500, "torchrun"),
            id="torchrun once a node under srun",
        ),
        pytest.param(
            BATCH_SCRIPT | DEEPSPEED, RankInfo(1, 1, 2, 2, "127.0.0.1", 29500, "deepspeed"), id="deepspeed inside an sbatch script"
        ),
    ],
)
def test_discover(environ: dict[str, str], expected: RankInfo) -> None:
    assert discover(environ) == expected


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        pytest.param({"RANK": "0"}, "WORLD_SIZE is not set", id="no WORLD_SIZE"),
        pytest.param({"WORLD_SIZE": "4"}, "WORLD_SIZE 4 is set without RANK", id="no RANK"),
        pytest.param(without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR is not set", id="no MASTER_ADDR"),
        pytest.param(without(TORCHRUN, "MASTER_PORT"), "MASTER_PORT is not set", id="no MASTER_PORT"),
        pytest.param(without(TORCHRUN, "LOCAL_RANK"), "LOCAL_RANK is not set", id="no LOCAL_RANK"),
        pytest.param(TORCHRUN | {"RANK": "8"}, "RANK 8 is outside the world of WORLD_SIZE 8", id="rank beyond the world"),
        pytest.param(TORCHRUN | {"RANK": "-1"}, "RANK -1 is outside", id="negative rank"),
        pytest.param(TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE 0", id="empty world"),
        pytest.param(TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK 4 is outside the 4 ranks", id="local rank beyond the machine"),
        pytest.param(TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE 9", id="machine larger than the world"),
        pytest.param(TORCHRUN | {"RANK": "one"}, "RANK is 'one', not an integer", id="no integer"),
        pytest.param(TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is not a port", id="no port"),
        pytest.param(
            task(1, 1, 0) | {"WORLD_SIZE": "4"}, "WORLD_SIZE 4 disagrees with SLURM_STEP_NUM_TASKS 5", id="WORLD_SIZE against the step"
        ),
        pytest.param(
            task(1, 1, 0) | {"RANK": "0", "WORLD_SIZE": "1"},
            "WORLD_SIZE 1 disagrees with SLURM_STEP_NUM_TASKS 5",
            id="stale RANK under srun",
        ),
        pytest.param(task(5, 0, 2), "SLURM_PROCID 5 is outside the step of 5 tasks", id="SLURM rank beyond the step"),
        pytest.param(without(task(1, 1, 0), "SLURM_LOCALID"), "SLURM_LOCALID is not set", id="no SLURM_LOCALID"),
        pytest.param(without(task(1, 1, 0), "SLURM_JOB_ID"), "SLURM_JOB_ID is not set", id="no SLURM_JOB_ID"),
        pytest.param(task(1, 1, 7), "SLURM_NODEID 7", id="node beyond the step"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes", id="mpirun"),
    ],
)
def test_bad_variables_are_named(environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(BadInputError) as caught:
        discover(environ)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("environ", [{}, TORCHRUN, DEEPSPEED, task(3, 1, 1)], ids=["alone", "torchrun", "deepspeed", "slurm"])
def test_to_environ_says_the_same(environ: dict[str, str]) -> None:
    info = discover(environ)
    again = discover(environ | to_environ(info))
    assert (again.rank, again.local_rank, again.world_size, again.local_world_size) == (
        info.rank,
        info.local_rank,
        info.world_size,
        info.local_world_size,
    )
    assert (again.master_addr, again.master_port) == (info.master_addr, info.master_port)


NODE_LISTS = {
    "gpu1": "gpu1",
    "gpu1,gpu2": "gpu1",
    "gpu[007-012,20],big1": "gpu007",
    "gpu[3,5-7]": "gpu3",
    "rack[1-2]node[03-04]": "rack1node03",
    "host-with-dash.cluster,n[1-2]": "host-with-dash.cluster",
}


@pytest.mark.parametrize(("nodelist", "host"), NODE_LISTS.items())
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed")
@pytest.mark.parametrize("nodelist", list(NODE_LISTS))
def test_first_host_as_scontrol_expands_it(nodelist: str) -> None:
    done = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("scontrol has no cluster configuration here")
    assert first_host(nodelist) == done.stdout.split()[0]


@pytest.mark.parametrize("nodelist", ["", "gpu[", "[]", "a b"])
def test_bad_node_list(nodelist: str) -> None:
    with pytest.raises(BadInputError, match="is not a list of hosts"):
        first_host(nodelist)


def test_one_process_finds_a_port_by_itself() -> None:
    """Port 0 of a world of one is accepted by PyTorch's own rendezvous."""
    script = "import torch.distributed as d; d.init_process_group('gloo'); print(d.get_rank(), d.get_world_size())"
    environ = os.environ | to_environ(discover({})) | {"GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "1"], done.stderr
