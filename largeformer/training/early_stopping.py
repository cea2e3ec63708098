"""Stop when validation no longer improves."""

from __future__ import annotations

import math
from typing import Any

from largeformer.config.schema import EarlyStoppingConfig


class EarlyStopping:
    """Counts validations in a row without an improvement of `min_delta`, from `start_step` on. Without a config it never stops.

    A value that is not finite is no improvement, and never becomes the best: a diverged run stops after `patience`
    validations, and the state stays valid JSON.
    """

    def __init__(self, config: EarlyStoppingConfig | None) -> None:
        self._enabled = config is not None
        self._config = config or EarlyStoppingConfig()
        self._best: float | None = None
        self._bad_validations = 0

    @classmethod
    def restored(cls, config: EarlyStoppingConfig | None, state: dict[str, Any]) -> EarlyStopping:
        """As `state_dict` left it; an empty state is a fresh start."""
        made = cls(config)
        if state:
            made.load_state_dict(state)
        return made

    @property
    def metric(self) -> str:
        """Key of the validation row to pass to `update`."""
        return self._config.metric

    @property
    def best(self) -> float | None:
        """The best finite value so far; None before there is one."""
        return self._best

    def update(self, value: float, step: int) -> bool:
        """Takes the value of the validation after `step` steps. Returns True where training should stop."""
        if self._improves(value):
            self._best, self._bad_validations = value, 0
        elif step >= self._config.start_step:
            self._bad_validations += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether training should stop, or should have."""
        return self._enabled and self._bad_validations >= self._config.patience

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self._best is None:
            return True
        gain = self._best - value if self._config.mode == "min" else value - self._best
        return gain > self._config.min_delta

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "bad_validations": self._bad_validations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        best = state["best"]
        self._best = None if best is None else float(best)
        self._bad_validations = int(state["bad_validations"])
