"""What a run tells the world: rows of numbers, events, samples of text. One protocol, several trackers, one fan-out.

Only rank 0 tracks: on the others the fan-out is empty. A tracker that fails after the start (dead network, full disk) is
reported once, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

Row = Mapping[str, float | int | None]
"""One line of `metrics.jsonl`: "step" and the values of that step, None where there is none."""

CHARTS: Mapping[str, str] = MappingProxyType(
    {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "loss_scale": "train/loss_scale",
        "skipped": "train/skipped",
        "samples": "train/samples",
        "tokens": "train/tokens",
        "val_loss": "val/loss",
        "val_bits_per_byte": "val/bits_per_byte",
        "tokens_per_s": "perf/tokens_per_s",
        "step_time_s": "perf/step_time_s",
        "tflops_per_device": "perf/tflops_per_device",
        "mfu": "perf/mfu",
        "memory_gib": "memory/peak_gib",
    }
)
"""Column of a row -> name of its chart, the same in TensorBoard and W&B."""

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes what happens in a run. `status` is that of status.json: finished, failed, requeue."""

    def log(self, row: Row) -> None: ...

    def event(self, kind: str, step: int, **fields: Any) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def close(self, status: str) -> None: ...


def chart_values(row: Row) -> dict[str, float | int]:
    """The row's values under their chart names; a column without a name of its own is charted under `train/`."""
    return {CHARTS.get(key, f"train/{key}"): value for key, value in row.items() if key != "step" and value is not None}


class FanOut:
    """A Tracker that passes everything on to several. `wandb_run_id` is to be kept in checkpoints, so that a resumed run
    continues the same W&B run; it is None where there is none."""

    def __init__(self, trackers: Sequence[Tracker] = (), wandb_run_id: str | None = None) -> None:
        self.wandb_run_id = wandb_run_id
        self._trackers = tuple(trackers)
        self._reported: set[int] = set()

    def log(self, row: Row) -> None:
        self._each(lambda tracker: tracker.log(row))

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._each(lambda tracker: tracker.event(kind, step, **fields))

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._each(lambda tracker: tracker.sample(step, prompt, text))

    def close(self, status: str) -> None:
        self._each(lambda tracker: tracker.close(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """A failing tracker is called again next time: a full disk may be emptied, a network may come back."""
        for number, tracker in enumerate(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                if number not in self._reported:
                    self._reported.add(number)
                    _log.warning(
                        "%s cannot record (%s: %s); training goes on, later failures of it are not reported",
                        type(tracker).__name__,
                        type(error).__name__,
                        error,
                    )
