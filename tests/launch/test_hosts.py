"""The deepspeed launcher over two hosts, by pdsh and ssh, as docs/launching.md says it: only to addresses of the loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from largeformer.launching.hostfile import read_hostfile
from largeformer.launching.local import free_port
from tests.launch.hosts import HOSTS, Hosts, missing, two_hosts

ROOT = Path(__file__).parents[2]
SECRET = "0123456789abcdef"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def deepspeed(hosts: Hosts, work: Path, *arguments: str, **environ: str) -> None:
    """`deepspeed --hostfile ...` typed in `work`, where `.deepspeed_env` stands."""
    launcher = Path(sys.executable).with_name("deepspeed")
    options = [f"--hostfile={hosts.hostfile}", f"--master_addr={HOSTS[0]}", f"--master_port={free_port()}", "--launcher=pdsh"]
    told = {**hosts.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environ}
    done = subprocess.run(
        [sys.executable, launcher, *options, "--module", *arguments],
        cwd=work,
        env=told,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def forward(work: Path, **more: str) -> None:
    wanted = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}
    (work / ".deepspeed_env").write_text("".join(f"{name}={text}\n" for name, text in wanted.items()))


def test_what_the_hosts_are_told(hosts: Hosts, tmp_path: Path) -> None:
    """Ranks and addresses; of W&B's variables those in `.deepspeed_env`, and no other."""
    assert read_hostfile(hosts.hostfile) == dict.fromkeys(HOSTS, 1)
    forward(tmp_path, WANDB_API_KEY=SECRET)
    deepspeed(hosts, tmp_path, "tests.launch.say", str(tmp_path), WANDB_ENTITY="of-the-login-node")
    for rank in range(2):
        told = json.loads((tmp_path / f"rank{rank}.json").read_text())
        wanted = {"rank": rank, "local_rank": 0, "world_size": 2, "local_world_size": 1, "master_addr": HOSTS[0], "launcher": "deepspeed"}
        assert told == {**told, **wanted}
        assert told["wandb"] == {"WANDB_API_KEY": SECRET}
