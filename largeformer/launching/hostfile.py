"""Hostfiles of the deepspeed launcher: `node1 slots=8`, a host a line. Checked before dozens of ssh connections fail one by one."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from largeformer.errors import BadInputError

_LINE = re.compile(r"(\S+)\s+slots=(-?\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in the order of the file. Raises BadInputError with everything that is wrong, unknown hosts included."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"hostfile {path} cannot be read ({error}); see launch/hostfile.example") from error
    hosts: dict[str, int] = {}
    problems = []
    for number, text in enumerate(lines, 1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        where, match = f"hostfile {path}, line {number}", _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{where}: {line!r} is not of the form 'HOST slots=N'")
            continue
        host, slots = match[1], int(match[2])
        if slots < 1:
            problems.append(f"{where}: {host} has slots={slots}; give the number of its GPUs, or remove the line")
        if host in hosts:
            problems.append(f"{where}: {host} stands twice; keep one line, with all its slots")
        elif not _is_known(host):
            problems.append(f"{where}: {host} is unknown here; correct its name, or add it to the DNS, /etc/hosts or ~/.ssh/config")
        hosts[host] = slots
    if not hosts and not problems:
        problems.append(f"hostfile {path} names no host; see launch/hostfile.example")
    if problems:
        raise BadInputError(problems)
    return hosts


def _is_known(host: str) -> bool:
    """By the resolver, or by ssh's own configuration, where a name may stand for another."""
    try:
        socket.getaddrinfo(host.rpartition("@")[2], None)
    except (OSError, UnicodeError):
        config = Path.home() / ".ssh" / "config"
        named = re.findall(r"(?im)^\s*host\s+(.*)$", config.read_text(errors="replace")) if config.is_file() else []
        return any(host in names.split() for names in named)
    return True
