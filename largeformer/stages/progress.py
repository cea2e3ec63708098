"""Progress of reading text: a bar with its rate on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PLAIN_LINE_EVERY = 30.0


class ByteProgress:
    """Counts UTF-8 bytes of text that pass through, out of `total` where that is known. Writes to stderr."""

    def __init__(self, title: str, total: int | None, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(stderr=True)
        self._done, self._started, self._last_line = 0, time.monotonic(), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console) if self._console.is_terminal else None
        self._task = self._bar.add_task(title, total=total) if self._bar else None

    def track(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            yield text
            self._advance(len(text.encode("utf-8")))

    def track_batches(self, batches: Iterable[list[str]]) -> Iterator[list[str]]:
        for batch in batches:
            yield batch
            self._advance(sum(len(text.encode("utf-8")) for text in batch))

    def _advance(self, size: int) -> None:
        self._done += size
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=size)
        elif time.monotonic() - self._last_line > _PLAIN_LINE_EVERY:
            self._last_line = time.monotonic()
            self._print()

    def _print(self) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        megabytes = self._done / 1e6
        self._console.print(f"{self._title}: {megabytes:.1f} MB, {megabytes / seconds:.1f} MB/s", highlight=False, soft_wrap=True)

    def __enter__(self) -> ByteProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self._print()
