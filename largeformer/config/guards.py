"""The recipe's section `guards`: what is watched while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from largeformer.config.section import Positive, PositiveInt, Section

LEAST_WINDOW = 10  # losses without which a mean and a deviation say nothing


class GuardsConfig(Section):
    """`null` switches a guard off.

    A step whose loss or gradients are not finite is always skipped; `max_consecutive_skips` of them in a row end the run. A loss
    `spike_z_score` standard deviations above the mean of the last `spike_window` is a spike: recorded, and with `rewind` the run
    goes back to its newest checkpoint, once, and leaves out the samples since (of at most `rewind_steps` steps: as many more are drawn from
    the data). No progress for `watchdog_timeout_s` seconds ends the run with
    the stacks of all ranks. Every `straggler_interval` steps a rank that takes `straggler_ratio` times as long as the median is
    named; every `replica_interval` steps data-parallel copies of the weights must be the same, bit for bit.
    """

    max_consecutive_skips: PositiveInt = 10
    spike_z_score: Positive | None = 8.0
    spike_window: PositiveInt = 100
    spike_action: Literal["log", "rewind"] = "log"
    rewind_steps: PositiveInt = 1000
    watchdog_timeout_s: Positive | None = 1200.0
    straggler_interval: PositiveInt | None = 100
    straggler_ratio: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 1.5
    replica_interval: PositiveInt | None = 200

    @property
    def rewinds(self) -> bool:
        return self.spike_action == "rewind"

    @property
    def what_is_left_out(self) -> dict[str, Any]:
        """The keys on which it depends."""
        return self.model_dump(mode="json", include={"spike_z_score", "spike_window", "rewind_steps"})


def guards_problems(guards: GuardsConfig, save_interval: int | None) -> Iterator[str]:
    """What is wrong with the section beside the interval at which checkpoints are saved."""
    if guards.spike_z_score is not None and guards.spike_window < LEAST_WINDOW:
        yield (
            f"guards.spike_window {guards.spike_window} is too short to tell a spike from noise: set it to at least {LEAST_WINDOW}, "
            "or guards.spike_z_score to null"
        )
    if not guards.rewinds:
        return
    if guards.spike_z_score is None:
        yield "guards.spike_action rewind needs guards.spike_z_score, which is null: give it a number such as 8"
    if save_interval is None:
        yield "guards.spike_action rewind needs a checkpoint to go back to: set checkpoint.save_interval, which is null"
    elif save_interval > guards.rewind_steps:
        yield (
            f"guards.rewind_steps {guards.rewind_steps} is below checkpoint.save_interval {save_interval}: a rewind may have to leave "
            "out as many steps; raise the one or lower the other"
        )
