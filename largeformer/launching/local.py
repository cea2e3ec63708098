"""Ranks of this machine, as `python -m torch.distributed.run` would start them, without its agent: one process a rank, one shared fate.

Rank 0 writes to this terminal; the others write to files, whose ends are shown if they are the first to fail.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from largeformer.errors import BadInputError
from largeformer.parallel.environment import LOCALHOST, SLURM_PORTS, RankInfo, to_environ

STOPPED_AFTER_SAVING = 75  # every rank ends so after a signal: no failure, the others are left to finish
GRACE_S = 5.0  # the other ranks usually fail for the same reason, and rank 0's own message is worth the wait
TERMINATE_S = 10.0
TAIL_LINES = 20
_PORTS = range(SLURM_PORTS.stop, 32_768)  # Linux gives those from 32768 on to connections
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Rank = subprocess.Popen[bytes]


def spawn(nproc: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> int:
    """Run `python -m largeformer *argv` on `nproc` ranks of this machine and return the exit code of the first rank that failed, else 0.

    A rank that fails ends the others: 5 s later by SIGTERM, 10 s after that by SIGKILL. Interrupts and terminations are passed
    on, so that the ranks may save before they stop. A rank killed by signal n counts as exit code 128 + n.
    """
    if nproc < 1:
        raise BadInputError(f"--nproc {nproc} starts no process; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="largeformer-ranks-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(nproc)]
        ranks: list[Rank] = []
        try:
            with _forwarding(ranks):
                _start(ranks, argv, os.environ if env is None else env, logs)
                blamed = _wait(ranks)
        finally:
            _signal_all(ranks, signal.SIGKILL)
        if blamed is None:
            return 0
        code = _exit_code(ranks[blamed])
        if blamed and code != STOPPED_AFTER_SAVING:
            _show_tail(blamed, code, logs[blamed])
        return code


def free_port() -> int:
    """A port of this machine that nobody listens on at this moment. One that the system gives to connections by itself could be gone before
    a rank listens there, and is taken only where no other is free."""
    for port in (*random.SystemRandom().sample(_PORTS, 100), 0):
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return int(listener.getsockname()[1])
    raise BadInputError("no port of this machine is free for the ranks to meet at: end what listens there")


def rank_environ(base: Mapping[str, str], rank: int, nproc: int, port: int) -> dict[str, str]:
    """The environment of one rank: launcher variables, its share of the cores, and gloo on the loopback (a laptop's host name
    may not resolve)."""
    info = RankInfo(rank, rank, nproc, nproc, LOCALHOST, port, "environment")
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    return {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo", **base, **to_environ(info)}


def _start(ranks: list[Rank], argv: Sequence[str], base: Mapping[str, str], logs: Sequence[Path]) -> None:
    """Start one rank for each log, adding it to `ranks` at once, so that an interrupt in between finds it there."""
    port = free_port()
    for rank, log in enumerate(logs):
        with log.open("wb") as output:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "largeformer", *argv],
                    env=rank_environ(base, rank, len(logs), port),
                    stdin=subprocess.DEVNULL,
                    stdout=None if rank == 0 else output,
                    stderr=None if rank == 0 else subprocess.STDOUT,
                    process_group=0,  # the terminal's Ctrl-C reaches this process alone, which passes it on once
                )
            )


@contextmanager
def _forwarding(ranks: Sequence[Rank]) -> Iterator[None]:
    """Pass signals on to every rank. Only a main thread can; elsewhere nothing is replaced."""

    def forward(number: int, _frame: object) -> None:
        _signal_all(ranks, signal.Signals(number))

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[Rank]) -> int | None:
    """Wait for every rank, ending the rest after a failure. Returns the rank whose exit code counts, or None where all ended with 0."""
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()

    def watch(rank: int) -> None:
        ranks[rank].wait()
        ended.put(rank)

    for rank in range(len(ranks)):
        threading.Thread(target=watch, args=(rank,), daemon=True).start()
    blamed: int | None = None
    measures: deque[tuple[float, signal.Signals]] = deque()  # what is still to be done to the rest, and when
    left = len(ranks)
    while left:
        try:
            rank = ended.get(timeout=max(0.0, measures[0][0] - time.monotonic()) if measures else None)
        except queue.Empty:
            _signal_all(ranks, measures.popleft()[1])
            continue
        left -= 1
        code = _exit_code(ranks[rank])
        if code == 0:
            continue
        failed_before = blamed is not None and _exit_code(ranks[blamed]) != STOPPED_AFTER_SAVING
        if not failed_before and code != STOPPED_AFTER_SAVING:
            now = time.monotonic()
            measures.extend([(now + GRACE_S, signal.SIGTERM), (now + GRACE_S + TERMINATE_S, signal.SIGKILL)])
            blamed = rank
        elif blamed is None:
            blamed = rank
    return blamed


def _exit_code(process: Rank) -> int:
    """As a shell counts: 128 + n for a process that signal n has ended."""
    assert process.returncode is not None
    return int(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def _signal_all(ranks: Sequence[Rank], number: signal.Signals) -> None:
    for process in ranks:
        if process.poll() is None:
            process.send_signal(number)


def _show_tail(rank: int, code: int, log: Path) -> None:
    lines = deque(log.read_text(errors="replace").splitlines(), maxlen=TAIL_LINES)
    print(f"rank {rank} failed first, with exit code {code}; its last lines:", file=sys.stderr)
    for line in lines:
        print(f"  [rank {rank}] {line}", file=sys.stderr)
