"""What a person sees while a run trains: a progress bar in a terminal, else one plain line a row."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from largeformer.tracking.tracker import Row, Tracker

REFRESHES_PER_SECOND = 2.0


class ConsoleTracker(Tracker):
    """Rank 0's voice. `clock` gives seconds; `console` defaults to standard output."""

    def __init__(
        self,
        run_name: str,
        total_steps: int,
        resume_step: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._total = total_steps
        self._history = _History(clock())
        self._bar = _Bar(self._console, run_name, total_steps, resume_step) if self._console.is_terminal else None

    def log(self, row: Row) -> None:
        if "val_loss" in row:
            self._history.validated(row)
            self._say(validation_line(row, self._total))
            return
        self._history.trained(row, self._clock())
        eta = self._history.seconds_left(self._total)
        if self._bar:
            self._bar.show(row, self._history.val_loss, eta)
        else:
            self._say(training_line(row, self._total, eta))

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._say(event_line(kind, step, self._total, fields))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._say(f"step {step}/{self._total}  sample")
        for line in printable(prompt + text).splitlines():
            self._say(f"    {line}")

    def close(self, status: str) -> None:
        if self._bar:
            self._bar.stop()
        self._say(self._history.summary(status, self._total, self._clock()))

    def _say(self, line: str) -> None:
        """One line, above the bar where there is one; long ones are not broken, and brackets are no markup."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def training_line(row: Row, total_steps: int, eta_s: float | None) -> str:
    """`step 20/200  loss 6.9123  lr 3.00e-03  grad_norm 1.02  12,345 tokens/s  MFU 41.2%  0.33 s/step  1.24 GiB  ETA 1:02`."""
    parts = [f"step {row['step']}/{total_steps}", *_values(row, _TRAINING_COLUMNS)]
    if row.get("skipped"):
        parts.append(f"{row['skipped']} skipped")
    if eta_s is not None:
        parts.append(f"ETA {duration(eta_s)}")
    return "  ".join(parts)


def validation_line(row: Row, total_steps: int) -> str:
    return "  ".join([f"step {row['step']}/{total_steps}", *_values(row, _VALIDATION_COLUMNS)])


def event_line(kind: str, step: int, total_steps: int, fields: dict[str, Any]) -> str:
    return "  ".join([f"step {step}/{total_steps}", kind, *(f"{key}={_short(value)}" for key, value in fields.items())])


_TRAINING_COLUMNS = (
    ("loss", "loss {:.4f}"),
    ("lr", "lr {:.2e}"),
    ("grad_norm", "grad_norm {:.2f}"),
    ("loss_scale", "scale {:g}"),
    ("tokens_per_s", "{:,.0f} tokens/s"),
    ("mfu", "MFU {:.1%}"),
    ("step_time_s", "{:.2f} s/step"),
    ("memory_gib", "{:.2f} GiB"),
)
_BAR_COLUMNS = tuple(column for column in _TRAINING_COLUMNS if column[0] in ("loss", "lr", "tokens_per_s", "mfu"))
_VALIDATION_COLUMNS = (("val_loss", "validation loss {:.4f}"), ("val_bits_per_byte", "{:.4f} bits/byte"))


def _values(row: Row, columns: tuple[tuple[str, str], ...]) -> list[str]:
    found = ((row.get(key), form) for key, form in columns)
    return [form.format(value) for value, form in found if value is not None]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value)).replace("\n", " ")


def duration(seconds: float) -> str:
    """`0:07`, `4:32`, `3:04:32`, `2d 3:04:32`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if not hours:
        return f"{m}:{s:02}"
    return (f"{days}d " if days else "") + f"{h}:{m:02}:{s:02}"


def printable(text: str) -> str:
    """`text` without control characters: what a model writes must not move the cursor."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class _History:
    """What the summary and the estimate of the time left need of the rows seen. Times in seconds."""

    def __init__(self, now: float) -> None:
        self.val_loss: float | None = None
        self._start = now
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._row: Row = {}
        self._best: tuple[float, int] | None = None
        self._tokens = self._busy_s = 0.0
        self._step = 0

    def trained(self, row: Row, now: float) -> None:
        self._row = row
        self._step = int(row["step"] or 0)
        self._last = (self._step, now)
        self._first = self._first or self._last
        seconds, speed = row.get("step_time_s"), row.get("tokens_per_s")
        if seconds and speed:
            self._tokens += speed * seconds
            self._busy_s += seconds

    def validated(self, row: Row) -> None:
        loss = row["val_loss"]
        self.val_loss = loss
        self._step = int(row["step"] or 0)  # which no line of the training may have had: a validation may end it
        if loss is not None and (self._best is None or loss < self._best[0]):
            self._best = (loss, self._step)

    def seconds_left(self, total_steps: int) -> float | None:
        """By the pace since the first row, validation and saving included: the first step, slow with compiling, does not count."""
        if not self._first or not self._last or self._last[0] <= self._first[0]:
            return None
        (first_step, first_time), (step, now) = self._first, self._last
        return (now - first_time) / (step - first_step) * (total_steps - step)

    def summary(self, status: str, total_steps: int, now: float) -> str:
        parts = [f"{status} at step {self._step}/{total_steps} in {duration(now - self._start)}"]
        parts += _values(self._row, (("loss", "loss {:.4f}"),))
        if self.val_loss is not None:
            parts.append(f"validation loss {self.val_loss:.4f}")
        if self._best is not None:
            parts.append(f"best {self._best[0]:.4f} at step {self._best[1]}")
        if self._busy_s:
            parts.append(f"{self._tokens / self._busy_s:,.0f} tokens/s on average")
        return "  ".join(parts + _values(self._row, (("memory_gib", "peak {:.2f} GiB"),)))


class _Bar:
    """A live progress bar. While it lives, whatever prints through Python, loggers made earlier included, lands above it."""

    def __init__(self, console: Console, run_name: str, total_steps: int, resume_step: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}", markup=False),
            console=console,
            refresh_per_second=REFRESHES_PER_SECOND,
            expand=True,  # the values give way in a narrow terminal, not the step or the time left
        )
        self._task = self._progress.add_task(run_name, total=total_steps, completed=resume_step, values="", eta="")
        stdout, stderr = sys.stdout, sys.stderr
        self._progress.start()
        # A logging handler keeps the stream it was made with, and would write across the bar.
        self._moved = [*_move_handlers(stdout, sys.stdout), *_move_handlers(stderr, sys.stderr)]

    def show(self, row: Row, val_loss: float | None, eta_s: float | None) -> None:
        values = _values(row, _BAR_COLUMNS)
        if val_loss is not None:
            values.insert(1, f"val {val_loss:.4f}")
        eta = "" if eta_s is None else f"ETA {duration(eta_s)}"
        self._progress.update(self._task, completed=row["step"], values="  ".join(values), eta=eta)

    def stop(self) -> None:
        self._progress.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)
        self._moved = []


def _move_handlers(old: TextIO, new: TextIO) -> list[tuple[logging.StreamHandler[TextIO], TextIO]]:
    """Points every logging handler that writes to `old` at `new`. Returns the handlers, each with the stream it had."""
    moved = [(handler, old) for handler in _stream_handlers() if handler.stream is old and new is not old]
    for handler, _ in moved:
        handler.setStream(new)
    return moved


def _stream_handlers() -> Iterator[logging.StreamHandler[TextIO]]:
    loggers = [logging.getLogger(), *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for logger in loggers:
        yield from (handler for handler in logger.handlers if isinstance(handler, logging.StreamHandler))
