"""Processes that work: order does not matter, death does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from largeformer.data.preparation.workers import available_cores, run_tasks
from largeformer.errors import BadInputError


def square(number: int) -> int:
    return number * number


def killed_once(path: Path) -> str:
    """Dies at the first try of each task, and leaves a mark."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def always_killed(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuses(number: int) -> int:
    raise BadInputError([f"{number} is bad", "so is all else"])


def fails(number: int) -> float:
    return 1 / number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once(workers: int) -> None:
    assert sorted(run_tasks(square, iter(range(20)), workers)) == [i * i for i in range(20)]
    assert list(run_tasks(square, [], workers)) == []


def test_the_task_of_a_killed_process_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"task-{i}" for i in range(3)]
    assert sorted(run_tasks(killed_once, [tmp_path / name for name in names], 2)) == names
    assert caplog.text.count("was killed by SIGKILL") == 3


def test_a_task_that_kills_its_processes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadInputError, match=r"was killed by SIGKILL.*data\.prepare_workers"):
        list(run_tasks(always_killed, range(4), 2))


def test_errors_of_a_task_come_through() -> None:
    with pytest.raises(BadInputError) as caught:
        list(run_tasks(refuses, range(3), 2))
    assert caught.value.problems[1] == "so is all else"
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(run_tasks(fails, range(3), 2))


def test_a_process_uses_the_cores_that_it_may() -> None:
    assert available_cores() == len(os.sched_getaffinity(0))
