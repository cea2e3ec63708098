"""No progress for too long: write down where every rank stands, and end the process, whatever its main thread is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO, TypeVar

T = TypeVar("T")

EXIT_CODE = 1
_GRACE_S = 10.0  # ranks stop at nearly the same moment: each has this long to write its stacks before the launcher ends them
_TICKS = 10  # looks at the clock in one timeout
_LONGEST_TICK_S = 5.0


class Watchdog:
    """A thread that is told of progress by `beat`. `folder` takes one file of stacks a rank; `report` is called with a sentence first.

    A main thread that waits in a collective lets other threads run. One that hangs in C code and keeps the interpreter's lock does
    not: for that case the thread keeps winding up a timer of `faulthandler`, which needs no lock, and which goes off when the thread can no
    longer wind it.
    """

    def __init__(self, timeout_s: float | None, folder: Path, rank: int, report: Callable[[str], None], grace_s: float = _GRACE_S) -> None:
        self._timeout = timeout_s
        self._path = folder / f"rank_{rank:05d}.txt"
        self._report = report
        self._grace = grace_s
        self._last, self._what = time.monotonic(), "the start"
        self._suspended = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, what: str) -> None:
        """Progress: `what` begins now."""
        self._last, self._what = time.monotonic(), what

    def following(self, items: Iterable[T], what: str) -> Iterator[T]:
        """`items`, each of which is progress."""
        for item in items:
            self.beat(what)
            yield item

    @contextlib.contextmanager
    def suspended(self, what: str) -> Iterator[None]:
        """Within, nothing is expected for however long: collectives that take part in it have a timeout of their own."""
        self.beat(what)
        self._suspended += 1
        try:
            yield
        finally:
            self._suspended -= 1
            self.beat(what)

    def __enter__(self) -> Self:
        if self._timeout is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            stacks = self._path.open("w")
            self.beat("the start")
            self._wind_up(self._timeout, stacks)  # here, since a hang may come before the thread has run at all
            self._thread = threading.Thread(target=self._watch, args=(self._timeout, stacks), name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, timeout: float, stacks: TextIO) -> None:
        with stacks:
            while not self._ended.wait(_tick(timeout)):
                self._wind_up(timeout, stacks)
                if not self._suspended and (silent := time.monotonic() - self._last) > timeout:
                    self._end(silent, stacks)
            faulthandler.cancel_dump_traceback_later()
        self._path.unlink()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()  # by the last rank

    def _wind_up(self, timeout: float, stacks: TextIO) -> None:
        faulthandler.dump_traceback_later(timeout + 2 * _tick(timeout) + self._grace, exit=True, file=stacks)

    def _end(self, silent: float, stacks: TextIO) -> None:
        faulthandler.dump_traceback_later(2 * self._grace, exit=True, file=stacks)  # should telling it take for ever
        sentence = f"no progress for {silent:.0f} s since {self._what} began; the stacks of this rank are in {self._path}"
        print(sentence, file=stacks, flush=True)
        faulthandler.dump_traceback(file=stacks, all_threads=True)
        print(f"watchdog: {sentence}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            self._report(sentence)
        time.sleep(self._grace)
        os._exit(EXIT_CODE)


def _tick(timeout: float) -> float:
    return min(timeout / _TICKS, _LONGEST_TICK_S)
