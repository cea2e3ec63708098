"""Steps that were skipped for what is not finite, and losses that stand out: what is remembered, and when a run must end."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from largeformer.config.guards import LEAST_WINDOW, GuardsConfig
from largeformer.training.engine import StepResult

_LEAST_DEVIATION = 1.0e-3  # of the mean: a loss that hardly moves has no noise to measure a spike by


class RunStopped(RuntimeError):
    """A guard ended the run. The message says what was seen, where the run stands, and what can be done."""


class SkippedSteps:
    """Tells an anomaly from fp16's search for a loss scale, and counts anomalies in a row.

    least_scale: fp16's smallest loss scale, at which an overflow is no longer a matter of the scale; None outside fp16.
    """

    def __init__(self, limit: int, least_scale: float | None) -> None:
        self._limit = limit
        self._least_scale = least_scale
        self._in_a_row = 0

    def after(self, step: int, result: StepResult, samples: tuple[int, int]) -> tuple[str, dict[str, Any]] | None:
        """The event to record of this step and its fields, None where it was taken. `samples`: those of its batch, the first and the
        one after the last.

        fp16's search for a scale is recorded as such.
        """
        if not result.skipped:
            self._in_a_row = 0
            return None
        if self._least_scale is not None and math.isfinite(result.loss) and result.loss_scale > self._least_scale:
            return "skipped", {"loss_scale": result.loss_scale}
        self._in_a_row += 1
        what = "gradients" if math.isfinite(result.loss) else "loss"
        return "nonfinite", {"what": what, "loss": result.loss, "samples": list(samples), "in_a_row": self._in_a_row}

    def check(self, step: int, samples: tuple[int, int]) -> None:
        """Raises RunStopped after as many anomalies in a row as the recipe allows."""
        if self._in_a_row >= self._limit:
            raise RunStopped(
                f"loss or gradients were not finite in {self._in_a_row} steps in a row, up to step {step} "
                f"(guards.max_consecutive_skips {self._limit}); the last batch was samples {samples[0]} to {samples[1] - 1}. No weight "
                "changed in them. The 'nonfinite' events name the samples; if those are sound, lower optimizer.lr or go back to an older "
                "checkpoint"
            )


class LossSpikes:
    """The z-score of each loss against those before it. Higher losses alone are spikes: a fall is what training is for."""

    def __init__(self, config: GuardsConfig) -> None:
        self._threshold = config.spike_z_score
        self._losses: deque[float] = deque(maxlen=config.spike_window)

    def score(self, loss: float) -> float | None:
        """The z-score of a finite `loss` where it is a spike, else None."""
        if self._threshold is None or not math.isfinite(loss):
            return None
        z, bound = 0.0, math.inf
        if len(self._losses) >= LEAST_WINDOW:
            mean = statistics.fmean(self._losses)
            deviation = max(statistics.pstdev(self._losses, mean), _LEAST_DEVIATION * abs(mean))
            z = (loss - mean) / deviation if deviation > 0 else 0.0
            bound = mean + self._threshold * deviation
        # What a spike leaves behind is bounded, so that it hides no other; a loss that stays high becomes the usual one in time.
        self._losses.append(min(loss, bound))
        return z if z > self._threshold else None

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.extend(float(loss) for loss in state["losses"])
