"""What a run tells the world: rows of numbers, events, samples of text. One protocol, several trackers, one fan-out.

Only rank 0 tracks: on the others the fan-out is empty. A tracker that fails after the start (dead network, full disk) is
reported once, and training goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from largeformer.artifact import Artifact
from largeformer.tracking.names import STEP, chart_name

Row = Mapping[str, float | int | None]
"""One line of `metrics.jsonl`: "step" and the values of that step, None where there is none."""

_log = logging.getLogger(__name__)


class Tracker:
    """Takes what happens in a run. A tracker overrides what means something to it."""

    def log(self, row: Row) -> None:
        """A row of numbers."""

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Something that happened at `step`."""

    def sample(self, step: int, prompt: str, text: str) -> None:
        """What the model of `step` goes on with after `prompt`."""

    def artifact(self, made: Artifact, sources: Sequence[Artifact]) -> None:
        """The stage's result, and what it was made from."""

    def close(self, status: str) -> None:
        """The end; `status` is that of status.json: finished, failed, requeue."""


def chart_values(row: Row) -> dict[str, float | int]:
    """The row's values under the names of their charts."""
    return {chart_name(key): value for key, value in row.items() if key != STEP and value is not None}


class FanOut(Tracker):
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

    def artifact(self, made: Artifact, sources: Sequence[Artifact]) -> None:
        self._each(lambda tracker: tracker.artifact(made, sources))

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
