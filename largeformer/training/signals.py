"""SIGTERM and SIGUSR1 ask a run to save and stop. Imports nothing heavy: the handler is there before anything else is.

The handler only remembers the first signal; the loop asks at the end of each step, all ranks together. Where there is nothing to
save (text being prepared, a checkpoint being evaluated) the work is stopped at once instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: come back later
STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """Leave the run now: everything is saved, or there was nothing to save. No failure: the same command goes on later.

    Not an Exception, so that nobody on the way takes it for a failure of his own.
    """


class StopSignals:
    """The handler of a process: kept where the operating system looks for it, and found there by those who ask."""

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._at = 0.0
        self._at_once = False
        self._process = os.getpid()

    @classmethod
    def install(cls) -> StopSignals:
        """In the main thread, before heavy imports."""
        handler = cls()
        for number in STOPPING:
            signal.signal(number, handler)
        return handler

    @classmethod
    def current(cls) -> StopSignals:
        """This process's handler; where none is installed (a notebook, a test), one that never hears anything."""
        handler = signal.getsignal(signal.SIGTERM)
        return handler if isinstance(handler, StopSignals) else cls()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked from it: its parent ends it by SIGTERM, and waits for that
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._first is not None:
            return  # a second signal changes nothing: the first is being seen to
        self._first, self._at = signal.Signals(number), time.monotonic()
        if self._at_once:
            raise self.stopping()

    @property
    def received(self) -> bool:
        return self._first is not None

    @property
    def number(self) -> int:
        """Of the signal that was received; 0 where none was."""
        return int(self._first or 0)

    def seconds_since(self) -> float:
        """Since the signal was received; 0 where none was."""
        return time.monotonic() - self._at if self.received else 0.0

    def stopping(self) -> StopRequested:
        assert self._first is not None
        return StopRequested(f"stopped by {self._first.name}")

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a signal raises StopRequested at once, also one that has come before: what runs here is lost without harm."""
        if self.received:
            raise self.stopping()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def release(self) -> None:
        """Give the signals back their usual meaning, which ends the process: for commands that save nothing. One that has come
        before is not lost."""
        for number in STOPPING:
            if signal.getsignal(number) is self:
                signal.signal(number, signal.SIG_DFL)
        if self._first is not None:
            os.kill(os.getpid(), self._first)
