"""SLURM batch scripts: the shipped ones, filled in for one recipe and one cluster, and handed to sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from largeformer.errors import BadInputError

_TIME = re.compile(r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}")
_PLAIN = re.compile(r"[\w./@%+-]+")  # an #SBATCH line has no quoting that every version reads alike
_SBATCH_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Job:
    """What a batch job asks of the cluster. `gpus_per_node` 0 asks for none; `time` is SLURM's, such as 24:00:00 or 2-00."""

    name: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int = 0
    time: str = "24:00:00"
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def problems(self) -> list[str]:
        found = []
        if not _TIME.fullmatch(self.time):
            found.append(f"--time {self.time} is no time limit of SLURM; write hours:minutes:seconds (24:00:00) or days-hours (2-00)")
        for option, value in (("--partition", self.partition), ("--account", self.account)):
            if value is not None and not _PLAIN.fullmatch(value.replace(",", "")):
                found.append(f"{option} {value!r} is no name that SLURM takes; see sinfo and sacctmgr show associations")
        return found


def fill_in(template: str, job: Job, log: str, variables: Mapping[str, str]) -> str:
    """`template` with `job` in its #SBATCH lines, and `variables` in place of its own. What is not asked for stays commented out.

    `log` is the file of the batch script's own output, in SLURM's pattern.
    """
    directives = {
        "job-name": re.sub(r"[^\w.+-]", "-", job.name),
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "output": log.replace(" ", "\\ "),
    }
    for name, value in directives.items():
        line = rf"^#+SBATCH --{name}=(.*)$"
        wanted = f"#SBATCH --{name}={value}" if value is not None else rf"##SBATCH --{name}=\1"
        template = _replace(line, wanted if value is None else wanted.replace("\\", r"\\"), template)
    for name, text in variables.items():
        template = _replace(rf"^{name}=.*$", f"{name}={shlex.quote(text)}".replace("\\", r"\\"), template)
    return template


def submit(script: Path, options: Sequence[str] = ()) -> str:
    """Hand `script` to sbatch and return the number of the job. Raises BadInputError, in SLURM's words, where it is not taken."""
    if shutil.which("sbatch") is None:
        raise BadInputError("sbatch is not on PATH; submit from a login node of the cluster, or look at the script with --dry-run")
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SBATCH_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BadInputError(f"sbatch has not answered for {_SBATCH_PATIENCE_S:.0f} s; see whether scontrol ping reaches SLURM") from error
    if done.returncode:
        said = "; ".join(done.stderr.split("\n")).strip("; ") or f"exit code {done.returncode}"
        raise BadInputError(f"sbatch did not take {script}: {said}")
    return done.stdout.strip().split(";")[0]


def _replace(pattern: str, replacement: str, text: str) -> str:
    text, count = re.subn(pattern, replacement, text, flags=re.MULTILINE)
    assert count == 1, f"{pattern} stands {count} times in the template"
    return text
