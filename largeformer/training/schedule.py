"""Learning-rate schedules in closed form: a pure function of the step, so that resuming needs no state.

    step <= w      lr * step / w                      linear warmup from 0 over w steps
    step >  w      min_lr + (lr - min_lr) * f(p)      p = clamp((step - w) / (d - w), 0, 1), d the last step of the decay

    linear               1 - p
    cosine               (1 + cos(pi p)) / 2          Loshchilov & Hutter 2017, arXiv:1608.03983, one period
    exponential          0.1^p
    polynomial           (1 - p)^2
    inverse-square-root  sqrt(w / t), t = w + p (d - w), w at least 1       Vaswani et al. 2017, arXiv:1706.03762, 5.3
    constant             1
    WSD                  1, then one of linear, cosine, exponential over the last steps     Hu et al. 2024, arXiv:2404.06395, 4.2

The minimum enters every style alike, as the level that the formula decays towards; it is no clamp. So inverse square root
with min_lr 0 is the published rule, and with min_lr > 0 lies above it by min_lr * (1 - f).

`step` is the number of the optimizer step about to be taken, among successful ones, from 1: the first update of a run uses
`at(1)`, and the update after n successful ones uses `at(n + 1)`, whatever was skipped for overflow in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from largeformer.config.rules import schedule_problems
from largeformer.config.schema import OptimizerConfig
from largeformer.errors import BadInputError

WSD_DECAY_FRACTION = 0.1
"""Share of the steps that WSD decays over, where the recipe does not say: about a tenth suffices (Hu et al. 2024, 4.2)."""

_DECAY: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {
        "linear": lambda p: 1.0 - p,
        "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
        "exponential": lambda p: 0.1**p,
        "polynomial": lambda p: (1.0 - p) ** 2,
        "constant": lambda p: 1.0,
    }
)


class LearningRateSchedule:
    """The learning rate at every step. Raises BadInputError where the numbers contradict each other."""

    def __init__(self, optimizer: OptimizerConfig, train_iters: int, warmup_iters: int) -> None:
        problems = schedule_problems(
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            train_iters=train_iters,
            warmup_iters=warmup_iters,
            decay_style=optimizer.lr_decay_style,
            decay_iters=optimizer.lr_decay_iters,
            wsd_decay_iters=optimizer.lr_wsd_decay_iters,
        )
        if problems:
            raise BadInputError(problems)
        self._optimizer = optimizer
        self._warmup = warmup_iters
        self._end = optimizer.lr_decay_iters or train_iters

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1; 0 means before the first step."""
        config = self._optimizer
        if step <= self._warmup and self._warmup > 0:
            return config.lr * step / self._warmup
        return config.min_lr + (config.lr - config.min_lr) * self._factor(step)

    def _factor(self, step: int) -> float:
        """f of the module's table, between 0 and 1."""
        style = self._optimizer.lr_decay_style
        if style == "WSD":
            decay_steps = self._wsd_decay_steps
            return _DECAY[self._optimizer.lr_wsd_decay_style](_progress(step, self._end - decay_steps, self._end))
        if style == "inverse-square-root":
            start = max(self._warmup, 1)
            return math.sqrt(start / min(max(step, start), max(self._end, start)))
        return _DECAY[style](_progress(step, self._warmup, self._end))

    @property
    def _wsd_decay_steps(self) -> int:
        default = min(max(1, round(WSD_DECAY_FRACTION * self._end)), self._end - self._warmup)
        return self._optimizer.lr_wsd_decay_iters or default


def _progress(step: int, start: int, end: int) -> float:
    """How far `step` lies between `start` and `end`, clamped to [0, 1]; an empty span is over at once."""
    return min(max((step - start) / (end - start), 0.0), 1.0) if end > start else 1.0
