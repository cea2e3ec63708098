"""The handler of signals, in small processes of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAD = """
import os, select, signal, sys
from largeformer.training.signals import StopRequested, StopSignals
assert not {"torch", "numpy", "deepspeed", "pydantic"} & set(sys.modules)
signals = StopSignals.install()
def send(name): os.kill(os.getpid(), signal.Signals[name])
"""


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param("assert not signals.received and signals.number == 0 and signals.seconds_since() == 0.0", 0, id="nothing"),
        pytest.param("send('SIGTERM'); assert signals.received and StopSignals.current() is signals", 0, id="remembered"),
        pytest.param("send('SIGUSR1'); send('SIGTERM'); assert signals.number == signal.SIGUSR1", 0, id="a second changes nothing"),
        pytest.param("signals.release(); send('SIGTERM')", -signal.SIGTERM, id="released"),
        pytest.param("send('SIGUSR1'); signals.release(); print('not reached')", -signal.SIGUSR1, id="one before the release is not lost"),
        pytest.param("signals.release(); assert not StopSignals.current().received", 0, id="nobody listens after the release"),
    ],
)
def test_what_a_signal_does(script: str, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", HEAD + script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("before", [True, False], ids=["before", "within"])
def test_at_once_leaves_the_work_once_and_is_no_exception_to_be_caught(before: bool) -> None:
    script = f"""
try:
    {'send("SIGTERM")' if before else "pass"}
    with signals.at_once():
        try:
            send("SIGTERM")
        except Exception:
            sys.exit(3)
        sys.exit(4)
except StopRequested as stop:
    send("SIGTERM")
    assert str(stop) == "stopped by SIGTERM"
"""
    ended = subprocess.run([sys.executable, "-c", HEAD + script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_forked_worker_ends_as_workers_do() -> None:
    """PyTorch's loading processes are forked, and ended by SIGTERM."""
    script = """
ready, told = os.pipe()
if (child := os.fork()) == 0:
    os.write(told, b"r")
    while True:  # not pause(), which misses a signal that comes right before it
        select.select([], [], [], 0.1)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
assert not signals.received
"""
    ended = subprocess.run([sys.executable, "-c", HEAD + script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
