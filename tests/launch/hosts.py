"""Two "hosts" on this machine for launchers that go by ssh: one sshd on two addresses of the loopback, with a key and configuration of its
own in one folder. Nothing of the user's own ssh is read or written."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from largeformer.launching.local import free_port

HOSTS = ("127.0.0.2", "127.0.0.3")
PACKAGES = {"sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh"}
_SERVER = """
{listen}
Port {port}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
"""
_CLIENT = """
Host *
  Port {port}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Why no hosts can be made here. What Debian has is installed, where root asks for it."""
    if os.geteuid() != 0:
        return "sshd is started by root"

    def lacking() -> list[str]:
        return [package for program, package in PACKAGES.items() if shutil.which(program, path=search_path()) is None]

    if lacking() and shutil.which("apt-get"):
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *lacking()]):
            subprocess.run(["apt-get", *command], env=environ, capture_output=True, timeout=300, check=False)
    return f"not installed, and not to be had: {', '.join(lacking())}" if lacking() else None


@dataclass(frozen=True)
class Hosts:
    """`environ`: for a launcher; its `ssh` reaches the hosts without a password."""

    environ: dict[str, str]
    hostfile: Path


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    port = free_port()
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    listen = "\n".join(f"ListenAddress {host}" for host in HOSTS)
    (folder / "sshd_config").write_text(_SERVER.format(listen=listen, port=port, folder=folder))
    (folder / "ssh_config").write_text(_CLIENT.format(port=port, folder=folder))
    (folder / "bin").mkdir()
    client = folder / "bin" / "ssh"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    client.chmod(0o755)
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    Path("/run/sshd").mkdir(exist_ok=True)
    program = shutil.which("sshd", path=search_path())
    assert program is not None
    server = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=(folder / "sshd.log").open("wb"))
    try:
        for host in HOSTS:
            _wait_for(host, port, server, folder / "sshd.log")
        yield Hosts({**os.environ, "PATH": f"{folder}/bin{os.pathsep}{search_path()}"}, hostfile)
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait_for(host: str, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection((host, port), timeout=1).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
