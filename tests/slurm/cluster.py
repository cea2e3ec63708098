"""A SLURM cluster of this machine: Debian's slurm-wlm and munge, one slurmctld, a slurmd for each "node", all of it in one folder.

Nodes are called 0x7f000002, 0x7f000003, ...: addresses of the loopback in a form that is a host name to SLURM and that every resolver
reads, so that what `scontrol show hostnames` prints can be connected to, with nothing written to /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from largeformer.launching.local import free_port

PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
PATIENCE_S = 420.0
_CONFIG = """
ClusterName=largeformer
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
MpiDefault=none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=300
KillWait=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here. What Debian has is installed, where root asks for it."""
    if os.geteuid() != 0:
        return "a SLURM cluster is started by root"
    lacking = [package for program, package in PACKAGES.items() if shutil.which(program, path=_path()) is None]
    if lacking and shutil.which("apt-get"):
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *lacking]):
            subprocess.run(["apt-get", *command], env=environ, capture_output=True, timeout=300, check=False)
    lacking = [package for program, package in PACKAGES.items() if shutil.which(program, path=_path()) is None]
    return f"not installed, and not to be had: {', '.join(lacking)}" if lacking else None


@dataclass
class Cluster:
    """Two nodes of one CPU each, in `folder`. `environ` is what its commands need."""

    folder: Path
    nodes: int = 2
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Cluster:
        for name in ("munge", "state"):
            (self.folder / name).mkdir(mode=0o700)
        (self.folder / "munge" / "key").write_bytes(os.urandom(128))
        (self.folder / "munge" / "key").chmod(0o600)
        host = socket.gethostname().partition(".")[0]
        names = [f"0x7f00000{number + 2}" for number in range(self.nodes)]
        lines = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.{number + 2} Port={free_port()} CPUs=1 State=UNKNOWN"
            for number, name in enumerate(names)
        ]
        config = _CONFIG.format(host=host, port=free_port(), folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(config)
        munge = [f"--{name}={self.folder}/munge/{file}" for name, file in MUNGE_FILES.items()]
        try:
            self._start("munged", "--foreground", "--force", *munge)
            self.wait(lambda: (self.folder / "munge" / "socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            for name in names:
                self._start("slurmd", "-D", "-N", name)
            self.wait(lambda: self.run("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(self.nodes), "the nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if len(self.daemons) > 2:
            self.run("scancel", "--state=RUNNING", check=False)
            self.run("scancel", "--state=PENDING", check=False)
            deadline = time.monotonic() + 60
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, **environ: str) -> str:
        done = subprocess.run(command, env={**self.environ, **environ}, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def requeued(self, job: str, times: int) -> None:
        """Until SLURM has put the job back for the time `times`, and started it again: its wait of two minutes is cut short."""
        self.wait(lambda: self.job(job)["Restarts"] == str(times), f"restart {times}")
        self.wait(lambda: self.job(job)["JobState"] != "COMPLETING", "the end of the job before")
        # Not at once: a node that has just let the job go refuses credentials of that same second, and the job would be killed.
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3", check=False)
        self.wait(lambda: self.job(job)["JobState"] != "PENDING", "the next start")

    def wait(self, condition: Callable[[], object], what: str, patience: float = PATIENCE_S) -> None:
        """Ask again and again. A job that was requeued waits minutes before SLURM starts it."""
        deadline = time.monotonic() + patience
        while not condition():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not dead, f"ended while {what} was waited for: {dead}: {self.logs()}"
            assert time.monotonic() < deadline, f"{what} did not come within {patience:.0f} s: {self.logs()}"
            time.sleep(0.25)

    def logs(self) -> str:
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self.daemons)}.log").open("wb") as log:
            self.daemons.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, cwd=self.folder))


MUNGE_FILES = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
