"""Progress of reading text: a bar with rate and time left on a terminal, a plain line now and then elsewhere. On stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_LINE_EVERY = 30.0


class ByteProgress:
    """Phases of work, one after the other. Each counts the bytes read of `total`, by which the time left is told, and the bytes of
    text that they held, which may be more: the rate is theirs."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._task: TaskID | None = None
        self._title = ""

    def phase(self, title: str, total: int | None = None) -> None:
        """Begin a phase that reads `total` bytes. The one before has ended."""
        self.end()
        self._title, self._total, self._done, self._skipped, self._text = title, total, 0, 0, 0
        self._started = self._last_line = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, rate="", left="")
        elif total is None:
            self.say(title)

    def advance(self, read: int, text: int) -> None:
        self._done += read
        self._text += text
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, rate=self._rate(), left=self._left())
        elif time.monotonic() - self._last_line > _PLAIN_LINE_EVERY:
            self._last_line = time.monotonic()
            self.say(self._line())

    def skip(self, read: int) -> None:
        """Of the input, `read` bytes need not be done: an earlier run has. They say nothing of the time that is left."""
        self._skipped += read
        self.advance(read, 0)

    def end(self) -> None:
        """End the phase: its bar is full, or its last line is printed."""
        if self._bar is not None and self._task is not None:
            total = self._total or 1
            self._bar.update(self._task, total=total, completed=total, left="")
        elif self._title and self._total is not None:
            self._done = self._total
            self.say(self._line())
        self._task, self._title = None, ""

    def say(self, line: str) -> None:
        """One line, above the bar where there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _line(self) -> str:
        share = f" ({self._done / self._total:.0%})" if self._total else ""
        return f"{self._title}: {decimal(self._text)} of text{share}, {self._rate()}{', ' + left if (left := self._left()) else ''}"

    def _rate(self) -> str:
        return f"{self._text / 1e6 / max(time.monotonic() - self._started, 1e-9):.1f} MB/s"

    def _left(self) -> str:
        """Time left, from the share of the input that this run has read."""
        read = self._done - self._skipped
        if not self._total or read <= 0 or self._done >= self._total:
            return ""
        seconds = (time.monotonic() - self._started) * (self._total - self._done) / read
        return (
            f"{seconds:.0f} s left"
            if seconds < 120
            else f"{seconds / 60:.0f} min left"
            if seconds < 7200
            else f"{seconds / 3600:.1f} h left"
        )

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.end()
        if self._bar is not None:
            self._bar.stop()
