"""How a training stage ends before its end: what it says when it stops for a signal, hangs, or goes back before a spike."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.artifact import read_status, write_status
from largeformer.config.schema import Recipe
from largeformer.parallel.environment import discover
from largeformer.stages.common.world import World, tell_failure
from largeformer.training.signals import StopRequested

if TYPE_CHECKING:
    from largeformer.tracking.tracker import Tracker
    from largeformer.training.checkpointing import Progress
    from largeformer.training.guards import Guards
    from largeformer.training.rewind import Rewind

LAUNCHER_PATIENCE_S = 30.0
"""Between a signal, or the end of the first rank, and SIGKILL, with DeepSpeed's launcher and torchrun; neither can be told otherwise."""


CutShort = Mapping[str, str]
"""By the name of a stage, a sentence about how the process before this one ended there."""


def announcer(recipe: Recipe, stage: str) -> Callable[[str], None]:
    """Says in `status.json`, from rank 0, that all ranks are about to save and stop: should they be killed meanwhile, it stands there."""
    folder, is_main = Path(recipe.run.output_dir), discover(os.environ).is_main
    return lambda reason: write_status(folder, "running", stage=stage, stopping=reason) if is_main else None


def cut_short(recipe: Recipe) -> CutShort:
    """Where the process before this one was to save and stop, and was killed before it had. To be asked first of all, before a stage says
    in `status.json` what it does."""
    status = read_status(Path(recipe.run.output_dir)) if discover(os.environ).is_main else None
    if not status or status.get("status") != "running" or "stopping" not in status:
        return {}
    reason = f"stopped by {status['stopping']}, and ended before its checkpoint was complete: the steps since the one before are done again"
    return {str(status.get("stage")): reason}


def hanging(recipe: Recipe, stage: str) -> Callable[[str], None]:
    """What the watchdog calls: `status.json` says why, whichever rank is left to write it."""
    return lambda sentence: tell_failure(recipe, stage, sentence)


def stop(guards: Guards, tracker: Tracker, step: int) -> StopRequested:
    """To be raised once the run is saved and its record closed. Says how long it took, and where that was close."""
    assert guards.stop is not None
    seconds = time.monotonic() - guards.stop.since
    tracker.event("requeue", step, reason=guards.stop.reason, seconds=round(seconds, 3))
    if seconds > LAUNCHER_PATIENCE_S and discover(os.environ).is_main:
        print(
            f"warning: {seconds:.0f} s went from {guards.stop.reason} to the end of the checkpoint; deepspeed and torchrun kill ranks "
            f"after {LAUNCHER_PATIENCE_S:.0f} s. Save oftener, make a step shorter, or send the signal earlier and to the ranks alone",
            file=sys.stderr,
        )
    return StopRequested(f"stopped by {guards.stop.reason} at step {step}, saved")


def rewind(world: World, folder: Path, guards: Guards, began_at: Progress, most_samples: int) -> None:
    """Write down that the samples between the newest checkpoint, or the beginning where there is none, and the spike are left out.
    Collective."""
    from largeformer.checkpoint.commit import newest
    from largeformer.training.anomalies import RunStopped
    from largeformer.training.checkpointing import read_state
    from largeformer.training.rewind import Rewind, read_rewinds, write_rewinds

    spike = guards.spike
    assert spike is not None

    def note() -> Rewind:
        checkpoint = newest(folder / "checkpoints")
        progress = read_state(checkpoint)["progress"] if checkpoint else asdict(began_at)
        made = Rewind(progress["step"], spike.step, progress["samples"], spike.end, spike.loss, spike.z_score)
        if made.end - made.first <= most_samples:
            write_rewinds(folder, [*read_rewinds(folder), made])
        return made

    made = world.from_main(note)
    if made.end - made.first > most_samples:
        raise RunStopped(
            f"the loss of step {made.spike_step} is a spike ({made.z_score:.1f} standard deviations), and the newest checkpoint, of step "
            f"{made.step}, lies {made.end - made.first} samples back, more than guards.rewind_steps allow ({most_samples}): lower "
            "checkpoint.save_interval"
        )
