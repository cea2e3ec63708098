"""What watches a run as it trains, together: the loop calls these few methods and knows nothing of what stands behind them."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from largeformer.config.schema import Recipe
from largeformer.parallel.groups import ParallelGroups
from largeformer.tracking.tracker import Tracker
from largeformer.training.anomalies import LossSpikes, RunStopped, SkippedSteps
from largeformer.training.engine import Engine, StepResult
from largeformer.training.replicas import Replicas
from largeformer.training.signals import StopSignals
from largeformer.training.stragglers import Stragglers
from largeformer.training.watchdog import Watchdog

Interruption = Literal["stopped", "rewind"]


@dataclass(frozen=True)
class Spike:
    """A loss far above those before it; `end`: the sample after its batch."""

    step: int
    end: int
    loss: float
    z_score: float


@dataclass(frozen=True)
class Stop:
    """Why all ranks stop, and since when that was known (`time.monotonic`)."""

    reason: str
    since: float


@dataclass
class Guards:
    """`may_rewind`: a spike interrupts the run. `stopping`: told why, once all ranks have agreed to stop; `hanging`: told by the watchdog,
    in its thread. `spike` and `stop`: the last of each, None where there was none."""

    groups: ParallelGroups
    tracker: Tracker
    signals: StopSignals
    limit_minutes: float | None
    skips: SkippedSteps
    spikes: LossSpikes
    watchdog: Watchdog
    stragglers: Stragglers
    replicas: Replicas
    may_rewind: bool = False
    stopping: Callable[[str], None] = lambda reason: None
    hanging: Callable[[str], None] = lambda sentence: None
    at_step: int = 0
    spike: Spike | None = None
    stop: Stop | None = None

    @contextlib.contextmanager
    def step(self, step: int, first: bool) -> Iterator[None]:
        """Around step number `step`, with the loading of its batch. The `first` of a process compiles, for however long."""
        patient = self.watchdog.suspended(f"step {step}") if first else contextlib.nullcontext()
        self.at_step = step
        self.watchdog.beat(f"step {step}")
        with patient, self.stragglers.timing(step):
            yield

    def after_step(self, step: int, result: StepResult, samples: tuple[int, int]) -> None:
        """Record what was seen in step `step`, whose batch was `samples` (the first, and the one after the last). Raises RunStopped, on
        every rank, where the run must not go on."""
        self.watchdog.beat(f"the checks after step {step}")
        if seen := self.skips.after(step, result, samples):
            self.tracker.event(seen[0], step, **seen[1])
        elif (z := self.spikes.score(result.loss)) is not None:
            self.spike = Spike(step, samples[1], result.loss, z)
            self.tracker.event("spike", step, loss=result.loss, z_score=z, samples=list(samples))
        for slow in self.stragglers.after(step):
            self.tracker.event("straggler", step, **slow)
        self.skips.check(step, samples)
        try:
            self.replicas.check(step)
        except RunStopped as error:
            self.tracker.event("replica differs", step, reason=str(error))
            raise

    def interruption(self, minutes: float) -> Interruption | None:
        """Whether the run is to be left now, alike on every rank: a signal on any of them, the time since the start on the slowest, a
        spike to be rewound. Collective."""
        out_of_time = self.limit_minutes is not None and minutes >= self.limit_minutes
        rewind = self.may_rewind and self.spike is not None
        number, seconds, late, back = self.groups.largest_of([self.signals.number, self.signals.seconds_since(), out_of_time, rewind])
        if number or late:
            reason = signal.Signals(round(number)).name if number else f"train.exit_duration_minutes {self.limit_minutes:g}"
            self.stop = Stop(reason, time.monotonic() - seconds)
            self.stopping(reason)
            return "stopped"
        return "rewind" if back else None

    def stalled(self, sentence: str) -> None:
        """What the watchdog calls from its thread before it ends the process."""
        self.hanging(sentence)
        self.tracker.event("stalled", self.at_step, reason=sentence)

    def state_dict(self) -> dict[str, Any]:
        return {"spikes": self.spikes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `state_dict` left it; an empty state is a fresh start."""
        if "spikes" in state:
            self.spikes.load_state_dict(state["spikes"])


def build_guards(
    recipe: Recipe,
    engine: Engine,
    tracker: Tracker,
    folder: Path,
    *,
    may_rewind: bool = False,
    stopping: Callable[[str], None] = lambda reason: None,
    hanging: Callable[[str], None] = lambda sentence: None,
) -> Guards:
    """The guards that the recipe asks for, over this rank's `engine`. Where ranks hang, `hanging` is told, and their stacks go to
    `folder`/stacks."""
    config, groups = recipe.guards, engine.groups
    guards = Guards(
        groups=groups,
        tracker=tracker,
        signals=StopSignals.current(),
        limit_minutes=recipe.train.exit_duration_minutes,
        skips=SkippedSteps(config.max_consecutive_skips, least_scale(recipe)),
        spikes=LossSpikes(config),
        watchdog=Watchdog(config.watchdog_timeout_s, folder / "stacks", groups.rank, lambda sentence: guards.stalled(sentence)),
        stragglers=Stragglers(config.straggler_interval, config.straggler_ratio, groups, engine.chunks),
        replicas=Replicas(config.replica_interval, engine.chunks, groups),
        may_rewind=may_rewind,
        stopping=stopping,
        hanging=hanging,
    )
    return guards


def least_scale(recipe: Recipe) -> float | None:
    """fp16's smallest loss scale: a static one is the smallest as well. None outside fp16."""
    train = recipe.train
    return (train.loss_scale or float(train.min_loss_scale)) if train.precision == "fp16" else None
