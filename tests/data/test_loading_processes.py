"""Loading processes of a rank whose whole process group gets a signal, as launchers and batch systems send it. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXIT_CODE = 75
# The rank reads on until it has heard the signal, then more than its processes can have loaded before.
RANK = """
import multiprocessing, sys
from largeformer.training.signals import StopSignals
signals = StopSignals.install()
from largeformer.data.loader import Batches, Reading
from largeformer.data.splits import MockSamples
batches = Batches(MockSamples(8, 500, 10**9, (1, 0)), lambda _: 4, Reading(2, num_workers=2))
batches.next()
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
while not signals.received:
    batches.next()
for _ in range(100):
    batches.next()
assert len(multiprocessing.active_children()) == 2
"""
# What is sent to a process for which the same signal waits already is lost.
LOST = "from multiprocessing import popen_fork; popen_fork.Popen.terminate = lambda self: None; sys.exit(75)"
CASES = {
    "SIGTERM, the rank's own lost": (signal.SIGTERM, LOST),
    "SIGTERM, the batches left open": (signal.SIGTERM, "sys.exit(75)"),
    "SIGUSR1, the batches closed": (signal.SIGUSR1, "del batches; assert not multiprocessing.active_children(); sys.exit(75)"),
}


def start(script: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A rank in a process group of its own, and its loading processes."""
    rank = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert rank.stdout is not None
    return rank, [int(pid) for pid in rank.stdout.readline().split()]


def wait_for_all(rank: subprocess.Popen[str]) -> str:
    """Until the rank and its loading processes, which hold the same pipes, have ended. What was written to stderr."""
    try:
        return rank.communicate(timeout=120)[1]
    except subprocess.TimeoutExpired:
        os.killpg(rank.pid, signal.SIGKILL)
        raise


@pytest.mark.parametrize(
    ("number", "end"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if "SIGUSR1" in name else ()) for name, case in CASES.items()],
)
def test_a_signal_to_all_is_seen_to_by_the_rank_alone(number: signal.Signals, end: str) -> None:
    rank, loading = start(RANK + end)
    assert len(loading) == 2
    os.killpg(rank.pid, number)
    said = wait_for_all(rank)
    assert rank.returncode == EXIT_CODE, said
    with pytest.raises(ProcessLookupError):
        os.killpg(rank.pid, 0)


def test_loading_processes_end_with_a_rank_that_is_killed() -> None:
    rank, loading = start(RANK)
    assert len(loading) == 2
    os.kill(rank.pid, signal.SIGKILL)
    wait_for_all(rank)
    assert rank.returncode == -signal.SIGKILL
