"""The console: plain lines read as sentences; in a terminal, other output lands above the bar."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from largeformer.tracking.console import ConsoleTracker, duration, printable

ROW = {
    "step": 20,
    "samples": 320,
    "tokens": 81920,
    "loss": 6.912345678,
    "lr": 3e-3,
    "grad_norm": 1.0234,
    "loss_scale": None,
    "skipped": 0,
    "step_time_s": 0.3318,
    "tokens_per_s": 12345.4,
    "tflops_per_device": 0.38,
    "mfu": 0.4123,
    "memory_gib": 1.2391,
}


class Clock:
    """Stands still until told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(clock: Clock | None = None, total: int = 200) -> tuple[ConsoleTracker, io.StringIO]:
    out = io.StringIO()
    return ConsoleTracker("quickstart", total, 0, Console(file=out, width=40), clock or Clock()), out


def test_a_row_is_one_line_however_narrow_the_log() -> None:
    tracker, out = plain()
    tracker.log(ROW)
    assert out.getvalue() == ("step 20/200  loss 6.9123  lr 3.00e-03  grad_norm 1.02  12,345 tokens/s  MFU 41.2%  0.33 s/step  1.24 GiB\n")


def test_the_scaler_is_shown_where_there_is_one() -> None:
    tracker, out = plain()
    tracker.log({**ROW, "loss_scale": 65536.0, "skipped": 2})
    assert "scale 65536  " in out.getvalue() and out.getvalue().endswith("  2 skipped\n")


def test_validation_events_and_samples_have_lines_of_their_own() -> None:
    tracker, out = plain()
    tracker.log({"step": 50, "val_loss": 5.43219, "val_bits_per_byte": 2.1})
    tracker.event("saved", 50, path="checkpoints/step_00000050", seconds=0.123456789)
    tracker.sample(50, "def [b]f(", "x):\n\treturn\x1b[2J x")
    assert out.getvalue().splitlines() == [
        "step 50/200  validation loss 5.4322  2.1000 bits/byte",
        "step 50/200  saved  path=checkpoints/step_00000050  seconds=0.123457",
        "step 50/200  sample",
        "    def [b]f(x):",
        "        return\ufffd[2J x",
    ]


def test_the_time_left_follows_the_pace_since_the_first_row() -> None:
    clock = Clock()
    tracker, out = plain(clock)
    clock.now += 100  # the first step compiles: no measure of the pace
    tracker.log({**ROW, "step": 1})
    clock.now += 20
    tracker.log({**ROW, "step": 11})  # 2 s a step, 189 steps left
    first, second = out.getvalue().splitlines()
    assert "ETA" not in first
    assert second.endswith("  ETA 6:18")


def test_the_summary() -> None:
    clock = Clock()
    tracker, out = plain(clock)
    for step, loss, speed, val in ((50, 5.0, 1000.0, 4.5), (100, 4.0, 3000.0, 4.75)):
        tracker.log({**ROW, "step": step, "loss": loss, "tokens_per_s": speed, "step_time_s": 1.0})
        tracker.log({"step": step, "val_loss": val})
    clock.now += 3723
    tracker.close("requeue")
    assert out.getvalue().splitlines()[-1] == (
        "requeue at step 100/200 in 1:02:03  loss 4.0000  validation loss 4.7500  best 4.5000 at step 50  "
        "2,000 tokens/s on average  peak 1.24 GiB"
    )


def test_a_validation_after_the_last_line_is_where_it_ended() -> None:
    tracker, out = plain()
    tracker.log({**ROW, "step": 140})
    tracker.log({"step": 150, "val_loss": 4.0})
    tracker.close("finished")
    assert out.getvalue().splitlines()[-1].startswith("finished at step 150/200 in")


def test_a_run_that_ends_before_its_first_row_has_a_summary_too() -> None:
    tracker, out = plain()
    tracker.close("failed")
    assert out.getvalue() == "failed at step 0/200 in 0:00\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (200000, "2d 7:33:20")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\r\x07b\n\tc") == "a\ufffd[31m\ufffd\ufffdb\n\tc"


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger whose handler was made before the bar, and holds standard output, as DeepSpeed's does."""
    logger, handler = logging.getLogger("made.before.the.bar"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)


def test_in_a_terminal_other_output_lands_above_the_bar(monkeypatch: pytest.MonkeyPatch, logger: logging.Logger) -> None:
    terminal = io.StringIO()
    (handler,) = logger.handlers
    assert isinstance(handler, logging.StreamHandler)
    monkeypatch.setattr(sys, "stdout", terminal)
    handler.setStream(terminal)
    tracker = ConsoleTracker("quickstart", 200, 0, Console(force_terminal=True, width=120, height=20))
    tracker.log(ROW)
    print("printed")
    logger.warning("logged")
    tracker.log({"step": 20, "val_loss": 5.5})
    tracker.log({**ROW, "step": 40})
    tracker.close("finished")
    assert (sys.stdout, handler.stream) == (terminal, terminal)
    screen = shown(terminal.getvalue())
    assert screen[:3] == ["printed", "logged", "step 20/200  validation loss 5.5000"]
    bars = [line for line in screen if line.startswith("quickstart")]
    assert len(bars) == 1
    assert re.search(r"40/200 +loss 6\.9123  val 5\.5000  lr 3\.00e-03  12,345 tokens/s  MFU 41\.2%", bars[0])
    assert screen[-1].startswith("finished at step 40/200")


CONTROL_OR_TEXT = re.compile(r"\x1b\[\??(?P<count>[\d;]*)(?P<command>[A-Za-z])|(?P<newline>\n)|(?P<home>\r)|(?P<text>[^\x1b\r\n]+)")


def shown(output: str) -> list[str]:
    """What a terminal shows of `output`, empty lines left out: just enough of one for a bar (line ends, cursor up, erase line)."""
    lines, row, column = [""], 0, 0
    for part in CONTROL_OR_TEXT.finditer(output):
        if text := part["text"]:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
        elif part["newline"]:
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part["home"]:
            column = 0
        elif part["command"] == "A":
            row -= int(part["count"] or 1)
        elif part["command"] == "K":
            lines[row] = ""
    return [line.rstrip() for line in lines if line.strip()]
