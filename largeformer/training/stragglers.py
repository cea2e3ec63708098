"""Which rank is slow? A step takes as long on every rank, since they wait for each other; so what is timed is each one's own work.

On CPUs that is the step without the time in which the rank waited for a collective or a neighbour. On GPUs waiting is done by the device,
behind the back of Python; there it is the time of the parts of the model that talk to nobody, as in Megatron-LM's detector.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from largeformer.parallel.agreement import gather
from largeformer.parallel.groups import ParallelGroups

_log = logging.getLogger(__name__)
_TIMED_STEPS = 5  # the last ones of an interval; their median is compared, so that one hiccup is no straggler


@dataclass(frozen=True)
class RankTime:
    rank: int
    stage: int
    host: str
    seconds: float


class Stragglers:
    """Times the last few steps of every `interval`, and compares the ranks' own times. `interval` None: never."""

    def __init__(self, interval: int | None, ratio: float, groups: ParallelGroups, chunks: Sequence[torch.nn.Module]) -> None:
        self._interval = interval if groups.layout.world_size > 1 else None
        self._ratio = ratio
        self._groups = groups
        on_gpu = next(chunks[0].parameters()).device.type == "cuda"
        self._own_time: Callable[[], contextlib.AbstractContextManager[Callable[[], float]]] = (
            (lambda: _device_time(chunks)) if on_gpu else _time_not_waited
        )
        self._seconds: list[float] = []

    @contextlib.contextmanager
    def timing(self, step: int) -> Iterator[None]:
        """Around step number `step`, with the loading of its batch."""
        if self._interval is None or -step % self._interval >= _TIMED_STEPS:
            yield
            return
        with self._own_time() as seconds:
            yield
        self._seconds.append(seconds())

    def after(self, step: int) -> list[dict[str, Any]]:
        """What to record after step `step`: an event for each slow rank, alike on every rank. Collective at the end of an interval."""
        if self._interval is None or step % self._interval or not self._seconds:
            return []
        mine, self._seconds = statistics.median(self._seconds), []
        times = gather(RankTime(self._groups.rank, self._groups.coordinates.pipeline, socket.gethostname(), mine))
        if any(math.isnan(time_.seconds) for time_ in times):
            if self._groups.rank == 0:
                _log.warning("slow ranks are not looked for: train.compile leaves nothing to time on a GPU")
            self._interval = None
            return []
        return slow_ranks(times, self._ratio)


def slow_ranks(times: Sequence[RankTime], ratio: float) -> list[dict[str, Any]]:
    """Those whose own time is more than `ratio` times the median of the others': of their pipeline stage, since stages have unequal work;
    of all where they are alone in it."""
    found = []
    for time_ in times:
        others = [other.seconds for other in times if other.rank != time_.rank and other.stage == time_.stage]
        others = others or [other.seconds for other in times if other.rank != time_.rank]
        usual = statistics.median(others)
        if time_.seconds > ratio * usual:
            found.append({"rank": time_.rank, "host": time_.host, "own_time_s": time_.seconds, "median_of_others_s": usual})
    return found


@contextlib.contextmanager
def _time_not_waited() -> Iterator[Callable[[], float]]:
    """Every wait of PyTorch's collectives, whoever calls them, goes through `Work.wait`."""
    waited = 0.0
    wait = dist.Work.wait

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal waited
        before = time.perf_counter()
        try:
            return wait(self, *args, **kwargs)
        finally:
            waited += time.perf_counter() - before

    started = time.perf_counter()
    dist.Work.wait = timed  # type: ignore[method-assign]
    try:
        yield lambda: took - waited
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        took = time.perf_counter() - started


@contextlib.contextmanager
def _device_time(chunks: Sequence[torch.nn.Module]) -> Iterator[Callable[[], float]]:
    """The forward of attention without its projections: no layout splits a sum in it over ranks."""
    spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    handles = []

    def begin(module: torch.nn.Module, args: Any) -> None:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        spans.append((begun, ended))

    def end(module: torch.nn.Module, args: Any, output: Any) -> None:
        spans[-1][1].record()

    def seconds() -> float:
        if not spans:  # compiled layers call no hooks
            return math.nan
        torch.cuda.synchronize()
        return float(sum(begun.elapsed_time(ended) for begun, ended in spans)) / 1000

    for chunk in chunks:
        for name, module in chunk.named_modules():
            if name.endswith("core_attention"):
                handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
