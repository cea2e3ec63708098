"""Many-rank tests as ordinary functions: a pool of gloo ranks that outlives a single case.

Starting a rank costs seconds, for the imports; running a case in a rank that is there costs milliseconds. So ranks are forked from
one process that has imported everything, and a pool starts them once and then executes functions in all of them:

    def total(ranks: RankContext, value: float) -> float:
        tensor = torch.tensor(value * (ranks.rank + 1))
        torch.distributed.all_reduce(tensor)
        return tensor.item()

    def test_total(ranks):
        assert ranks(2).run(total, 10.0) == [30.0, 30.0]

The function is found by its name, so it stands at the top level of a test module; arguments and results are pickled between
our own processes. The world's default group is there; a case builds and destroys the groups that it needs besides. A failing
case ends its pool, since the groups of its ranks may be in any state; the next `run` starts a new one.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from largeformer.launching.local import free_port, rank_environ

START_S = 120.0  # importing everything on a busy machine, once in a session
CASE_S = 180.0
AFTER_FAILURE_S = 5.0  # what the other ranks have to say, before they are ended


@dataclass(frozen=True)
class RankContext:
    """What a case is told: which rank it is, of how many."""

    rank: int
    world_size: int


class RankFailure(AssertionError):
    """A rank raised, died or hung. The message holds the traceback of each that did."""


def forking() -> multiprocessing.context.ForkServerContext:
    """Starts processes as copies of one that has imported what ranks need, and computes on CPUs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.rank_imports"])
    return context


class RankPool:
    """`world_size` processes with one gloo group, started at the first `run` and kept."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = CASE_S) -> list[Any]:
        """`function(RankContext, *args)` on every rank at once; the results by rank. A hang ends after `timeout` seconds with
        the stack of each rank that stood still. Raises RankFailure where any rank did not return."""
        if not self._processes:
            self._start()
        results = self._collect((function, args, timeout), timeout)
        return results

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="largeformer-ranks-")
        context = forking()
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            environ = {**rank_environ(os.environ, rank, self.world_size, port), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            process = context.Process(target=_serve, args=(rank, environ, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(None, START_S)

    def _collect(self, request: Any, timeout: float) -> list[Any]:
        """Send `request` to every rank (None: nothing, the ranks report on their own) and gather the answers."""
        if request is not None:
            for pipe in self._pipes:
                pipe.send(request)
        answers: dict[int, Any] = {}
        problems: dict[int, str] = {}
        deadline = time.monotonic() + timeout + AFTER_FAILURE_S  # ranks that hang end themselves earlier, with their stacks
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while waiting and (ready := multiprocessing.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank], problem = pipe.recv()
                except EOFError:
                    problem = self._last_words(rank)
                if problem is not None:
                    problems[rank] = problem
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
        if problems or waiting:
            silent = f"no answer from ranks {sorted(waiting.values())}" if waiting else ""
            self.close()
            told = [f"--- rank {rank} of {self.world_size} ---\n{text}" for rank, text in sorted(problems.items())]
            raise RankFailure("\n".join([*told, silent]).strip())
        return [answers[rank] for rank in range(self.world_size)]

    def _last_words(self, rank: int) -> str:
        assert self._folder is not None
        self._processes[rank].join()
        stacks = (Path(self._folder.name) / f"stacks{rank}").read_text()
        return stacks or f"the process died with exit code {self._processes[rank].exitcode}"


class PoolCache:
    """The pools of a test session, by world size. Those used longest ago are closed so that few ranks stay in memory."""

    def __init__(self, most_ranks: int = 12) -> None:
        self._most_ranks = most_ranks
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        pool = self._pools.pop(world_size, None) or RankPool(world_size)
        self._pools[world_size] = pool
        while len(self._pools) > 1 and sum(self._pools) > self._most_ranks:
            self._pools.pop(next(iter(self._pools))).close()
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def _serve(rank: int, environ: dict[str, str], folder: str, pipe: Connection) -> None:
    """The life of one rank: join the group, then execute what comes through the pipe until it closes."""
    # Data loader workers are children of a rank; a daemon may have none. It still ends with the session: see `close`.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ.clear()  # the process that it was forked from has that of the session's first pool
    os.environ.update(environ)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    context = RankContext(rank, int(environ["WORLD_SIZE"]))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=context.world_size)
    pipe.send((None, None))
    with open(Path(folder) / f"stacks{rank}", "w") as stacks:
        while True:
            try:
                function, args, timeout = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(timeout, exit=True, file=stacks)
            answer: tuple[Any, str | None]
            try:
                answer = function(context, *args), None
            except BaseException:
                answer = None, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            gc.collect()  # engines lie in reference cycles, and hold process groups with their threads
            pipe.send(answer)
