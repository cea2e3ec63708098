"""TensorBoard: the same charts as W&B, in the stage's `tensorboard/` folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from largeformer.tracking.tracker import Row, Tracker, chart_values

FLUSH_SECONDS = 20
"""Seconds of charts that a killed process may lose; TensorBoard's own default is two minutes."""


class TensorBoardTracker(Tracker):
    """Resuming hides what an earlier process charted after `resume_step` (0: a fresh start, everything)."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        purge_step = resume_step + 1 if resume_step > 0 else 0
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def log(self, row: Row) -> None:
        step = row["step"]
        for chart, value in chart_values(row).items():
            self._writer.add_scalar(chart, value, step)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._writer.add_scalar(f"events/{kind}", 1, step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        # Indented by four spaces, Markdown shows text as it is.
        shown = "\n".join(f"    {line}" for line in (prompt + text).splitlines())
        self._writer.add_text("sample", shown, step)

    def close(self, status: str) -> None:
        self._writer.close()
