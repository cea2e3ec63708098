"""Processes that encode units. Each has a pipe of its own: one that dies is noticed at once, and when this one dies they end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from largeformer.errors import BadInputError

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


def available_cores() -> int:
    """Cores that this process may use: fewer than the machine has, in a container or under SLURM."""
    return len(os.sched_getaffinity(0))


def run_tasks(work: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of each task, in the order in which they finish; in this process where `workers` is 1.

    A task waits for a free process, so as many are held as there are processes. A task whose process is killed is done again by a
    new one, once. Raises what `work` raised, and BadInputError where a task killed its process twice.
    """
    if workers == 1:
        yield from map(work, tasks)
        return
    pool: list[_Worker[T, R]] = []
    try:
        for task in tasks:
            if len(pool) < workers:
                pool.append(_Worker(work, task))
                continue
            worker, result = _next(pool)
            worker.give(task)
            yield result
        while pool:
            worker, result = _next(pool)
            pool.remove(worker)
            worker.close()
            yield result
    finally:
        for worker in pool:
            worker.close()


class _Worker(Generic[T, R]):
    """One process, which works on one task."""

    def __init__(self, work: Callable[[T], R], task: T) -> None:
        self._work, self._task, self._deaths = work, task, 0
        self._start()

    def _start(self) -> None:
        # Not forked: this process has threads, which a fork would lose in the middle of what they do.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._work, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.give(self._task)

    def give(self, task: T) -> None:
        self._task = task
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # The next `result` tells of its death.
            self.connection.send(task)

    def result(self) -> R:
        """What came of the task. Raises what the work raised, and EOFError or ConnectionResetError where the process has died."""
        succeeded, value = self.connection.recv()
        self._deaths = 0
        if succeeded:
            return value  # type: ignore[no-any-return]
        raise value if isinstance(value, BadInputError) else RuntimeError(f"a process of prepare failed:\n{value}")

    def replace(self) -> None:
        """After the process has died: another one on the same task. Raises BadInputError the second time."""
        self._process.join()
        code = self._process.exitcode or 0
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._deaths += 1
        if self._deaths > 1 or code >= 0:
            raise BadInputError(
                f"a process of prepare {ended}: what is finished is kept, and prepare goes on from there when it is run again. "
                "If memory ran out, set data.prepare_workers lower"
            )
        logger.warning("a process of prepare %s: another one does its part again", ended)
        self.close()
        self._start()

    def close(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join()


def _next(pool: list[_Worker[T, R]]) -> tuple[_Worker[T, R], R]:
    """The next worker that is done, and its result. Those that have died are replaced meanwhile."""
    while True:
        ready = wait([worker.connection for worker in pool])
        for worker in [worker for worker in pool if worker.connection in ready]:
            try:
                return worker, worker.result()
            except (EOFError, ConnectionResetError):
                worker.replace()


def _serve(work: Callable[[T], R], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the first one decides.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task = connection.recv()
            try:
                answer: tuple[bool, Any] = (True, work(task))
            except BadInputError as error:
                answer = (False, error)
            except Exception:
                answer = (False, traceback.format_exc())
            connection.send(answer)
