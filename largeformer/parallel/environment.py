"""Launcher variables to rank and world: what torchrun, DeepSpeed's launcher or SLURM's srun has told this process.

Only the mapping of variables is read, never the machine, so every case can be tested with a dictionary. SLURM speaks its own
names, and not every SLURM shell is a rank:

    where the process was started    SLURM_PROCID  SLURM_NTASKS  SLURM_STEP_ID  SLURM_STEP_NUM_TASKS   it is
    sbatch script, without srun      0             all tasks     absent         absent                 one process
    salloc shell on the login node   absent        all tasks     absent         absent                 one process
    salloc's interactive step        0             all tasks     set            1                      one process
    srun                             the rank      all tasks     set            all tasks              a rank

so a rank is known by its step, and the world is the number of tasks of that step. SLURM_NTASKS alone is the size of the
allocation: a script that took it for the world would wait for ranks that nobody started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from largeformer.errors import BadInputError

Launcher = Literal["torchrun", "deepspeed", "slurm", "environment", "none"]

LOCALHOST = "127.0.0.1"
SLURM_PORTS = range(20000, 30000)  # below the ephemeral ports that the kernel hands out


@dataclass(frozen=True)
class RankInfo:
    """This process among its peers. `master_port` 0 stands for any free port, which only a world of one can use."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: Launcher

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, which prints, logs and writes what is written once."""
        return self.rank == 0


def discover(environ: Mapping[str, str]) -> RankInfo:
    """Who this process is. Raises BadInputError where the variables are incomplete or contradict each other."""
    if "RANK" in environ:
        return _from_rank_variables(environ)
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ:
        return _from_slurm(environ)
    return _alone(environ)


def to_environ(info: RankInfo) -> dict[str, str]:
    """The variables that say the same to PyTorch and DeepSpeed (LOCAL_SIZE is DeepSpeed's name for LOCAL_WORLD_SIZE)."""
    return {
        "RANK": str(info.rank),
        "LOCAL_RANK": str(info.local_rank),
        "WORLD_SIZE": str(info.world_size),
        "LOCAL_WORLD_SIZE": str(info.local_world_size),
        "LOCAL_SIZE": str(info.local_world_size),
        "MASTER_ADDR": info.master_addr,
        "MASTER_PORT": str(info.master_port),
    }


def first_host(nodelist: str) -> str:
    """The first host of a compressed node list: `gpu[007-012,20],big1` -> `gpu007`, `rack[1-2]node[03-04]` -> `rack1node03`."""
    first_item = re.fullmatch(r"((?:[^,\[\]\s]|\[[\w,-]+\])+)(?:,.*)?", nodelist)
    if first_item is None:
        raise BadInputError(f"SLURM_STEP_NODELIST {nodelist!r} is not a list of hosts; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first_item.group(1))


def _from_rank_variables(environ: Mapping[str, str]) -> RankInfo:
    rank = _integer(environ, "RANK")
    world_size = _integer(environ, "WORLD_SIZE", "start every rank with the number of all ranks")
    if world_size < 1 or not 0 <= rank < world_size:
        raise BadInputError(f"RANK {rank} is outside the world of WORLD_SIZE {world_size}; ranks run from 0 to WORLD_SIZE - 1")
    _check_against_slurm(environ, world_size)
    if world_size == 1:
        return RankInfo(0, 0, 1, 1, environ.get("MASTER_ADDR", LOCALHOST), _port(environ, 0), _launcher(environ))
    local_world_size = _local_world_size(environ, world_size)
    local_rank = _integer(environ, "LOCAL_RANK", "set it to the number of the rank on its own machine")
    if not 0 <= local_rank < local_world_size:
        raise BadInputError(f"LOCAL_RANK {local_rank} is outside the {local_world_size} ranks of this machine (LOCAL_WORLD_SIZE)")
    if "MASTER_ADDR" not in environ:
        raise BadInputError(f"MASTER_ADDR is not set for WORLD_SIZE {world_size}; set it to the host of rank 0")
    return RankInfo(rank, local_rank, world_size, local_world_size, environ["MASTER_ADDR"], _port(environ), _launcher(environ))


def _from_slurm(environ: Mapping[str, str]) -> RankInfo:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    world_size = _integer(environ, tasks, "start the ranks with srun --ntasks")
    rank = _integer(environ, "SLURM_PROCID")
    if not 0 <= rank < world_size:
        raise BadInputError(f"SLURM_PROCID {rank} is outside the step of {world_size} tasks ({tasks}); unset the stale SLURM variables")
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE") != world_size:
        raise BadInputError(
            f"WORLD_SIZE {environ['WORLD_SIZE']} disagrees with {tasks} {world_size}; unset WORLD_SIZE, or start as many tasks with srun"
        )
    if world_size == 1:
        return RankInfo(0, 0, 1, 1, environ.get("MASTER_ADDR", LOCALHOST), _port(environ, 0), "slurm")
    return RankInfo(
        rank=rank,
        local_rank=_integer(environ, "SLURM_LOCALID", "start the ranks with srun"),
        world_size=world_size,
        local_world_size=_slurm_tasks_here(environ, world_size),
        master_addr=environ.get("MASTER_ADDR") or first_host(_slurm_nodelist(environ)),
        master_port=_port(environ, _slurm_port(environ)),
        launcher="slurm",
    )


def _alone(environ: Mapping[str, str]) -> RankInfo:
    """No launcher: one process. A world that someone has announced without ranks must not run as many worlds of one."""
    if "WORLD_SIZE" in environ and _integer(environ, "WORLD_SIZE") != 1:
        raise BadInputError(f"WORLD_SIZE {environ['WORLD_SIZE']} is set without RANK; start the ranks with deepspeed, torchrun or srun")
    if "OMPI_COMM_WORLD_SIZE" in environ and _integer(environ, "OMPI_COMM_WORLD_SIZE") != 1:
        raise BadInputError(
            f"mpirun started {environ['OMPI_COMM_WORLD_SIZE']} processes (OMPI_COMM_WORLD_SIZE) without RANK; "
            "start the ranks with deepspeed, torchrun or srun"
        )
    return RankInfo(0, 0, 1, 1, LOCALHOST, 0, "none")


def _check_against_slurm(environ: Mapping[str, str], world_size: int) -> None:
    """Refuse RANK and WORLD_SIZE left over in a shell from which srun starts several ranks: each would take itself for the same one.

    A launcher that srun starts once a machine counts its own ranks; it is known by LOCAL_WORLD_SIZE or LOCAL_SIZE.
    """
    started_by_launcher = "LOCAL_WORLD_SIZE" in environ or "LOCAL_SIZE" in environ
    if started_by_launcher or "SLURM_STEP_ID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return
    tasks = _integer(environ, "SLURM_STEP_NUM_TASKS")
    if tasks not in (1, world_size):
        raise BadInputError(f"WORLD_SIZE {world_size} disagrees with SLURM_STEP_NUM_TASKS {tasks}; unset RANK and WORLD_SIZE under srun")


def _launcher(environ: Mapping[str, str]) -> Launcher:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in environ else "environment"


def _local_world_size(environ: Mapping[str, str], world_size: int) -> int:
    """Ranks on this machine; where no launcher says it, all ranks are taken to share one machine."""
    name = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in environ), None)
    local = _integer(environ, name) if name else world_size
    if not 0 < local <= world_size:
        raise BadInputError(f"{name} {local} does not lie between 1 and WORLD_SIZE {world_size}")
    return local


def _slurm_nodelist(environ: Mapping[str, str]) -> str:
    """The hosts of this step; rank 0 is on the first. A step may use fewer hosts than its job, so the step's list comes first."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in environ:
            return environ[name]
    raise BadInputError("SLURM_STEP_NODELIST is not set; start the ranks with srun, or set MASTER_ADDR to the host of rank 0")


def _slurm_tasks_here(environ: Mapping[str, str], world_size: int) -> int:
    """Tasks on this host, out of `SLURM_STEP_TASKS_PER_NODE`: `2(x3),1` is 2, 2, 2, 1 for the nodes 0 to 3 (`SLURM_NODEID`)."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size))
    per_node: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        per_node += [int(count)] * int(repeat or 1)
    node = _integer(environ, "SLURM_NODEID") if len(per_node) > 1 else 0
    if not 0 <= node < len(per_node):
        raise BadInputError(f"SLURM_NODEID {node} does not stand in SLURM_STEP_TASKS_PER_NODE {text!r}; start the ranks with srun")
    return per_node[node]


def _slurm_port(environ: Mapping[str, str]) -> int:
    """A port that every rank derives alike, and that jobs and steps side by side on one host rarely share."""
    job = _integer(environ, "SLURM_JOB_ID", "set MASTER_PORT to a free port of the host of rank 0")
    return SLURM_PORTS[(16 * job + _integer(environ, "SLURM_STEP_ID")) % len(SLURM_PORTS)]


def _port(environ: Mapping[str, str], default: int | None = None) -> int:
    if default is not None and "MASTER_PORT" not in environ:
        return default
    port = _integer(environ, "MASTER_PORT", "set it to a free port of MASTER_ADDR")
    if not 0 <= port < 65536:
        raise BadInputError(f"MASTER_PORT {port} is not a port; it lies between 1 and 65535")
    return port


def _integer(environ: Mapping[str, str], name: str, fix: str = "set it as the launcher would") -> int:
    value = environ.get(name)
    if value is None:
        raise BadInputError(f"{name} is not set; {fix}")
    try:
        return int(value)
    except ValueError:
        raise BadInputError(f"{name} is {value!r}, not an integer; {fix}") from None
