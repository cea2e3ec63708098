"""The trackers that a recipe asks for."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact
from largeformer.config.tracking import TrackingConfig
from largeformer.tracking.tracker import FanOut, Tracker

_log = logging.getLogger(__name__)


def build_trackers(
    tracking: TrackingConfig,
    folder: Path,
    run_name: str,
    record: Mapping[str, Any],
    resume_step: int,
    total_steps: int,
    wandb_run_id: str | None = None,
    enabled: bool = True,
) -> FanOut:
    """The trackers that the recipe asks for, writing into the stage's `folder`.

    `record` is what W&B keeps as the run's config; `resume_step` is the step of the checkpoint that training goes on from, 0 for a
    fresh start: what an earlier process recorded after it is cut. `enabled` is False on ranks other than 0. TensorBoard or W&B failing to
    start is a warning; OSError where `metrics.jsonl` cannot be written, since then nothing of the run would be kept.
    """
    if not enabled:
        return FanOut(wandb_run_id=wandb_run_id)
    from largeformer.tracking.console import ConsoleTracker
    from largeformer.tracking.jsonl import JsonlTracker

    trackers: list[Tracker] = [JsonlTracker(folder, resume_step)]
    if tracking.tensorboard:
        trackers += _started("TensorBoard", lambda: _tensorboard(folder, resume_step))
    if tracking.wandb.mode != "disabled":
        run_id = wandb_run_id = wandb_run_id or _sweep_run(os.environ) or uuid.uuid4().hex[:8]
        trackers += _started("W&B", lambda: _wandb(tracking, folder, run_name, record, run_id, resume_step))
    trackers.append(ConsoleTracker(run_name, total_steps, resume_step))
    return FanOut(trackers, wandb_run_id)


def record_artifact(
    tracking: TrackingConfig, run_name: str, record: Mapping[str, Any], made: Artifact, sources: Sequence[Artifact]
) -> None:
    """In W&B, what a stage that trains nothing has made of `sources`: in a run of its own, which is all there is to tell of it. Nothing
    where W&B is disabled; that it fails is a warning."""
    if tracking.wandb.mode != "disabled":
        run_id = uuid.uuid4().hex[:8]
        tracker = FanOut(_started("W&B", lambda: _wandb(tracking, made.path, run_name, record, run_id, resume_step=0)))
        tracker.artifact(made, sources)
        tracker.close("finished")


def _started(name: str, start: Callable[[], Tracker]) -> list[Tracker]:
    try:
        return [start()]
    except Exception as error:
        _log.warning("%s could not start (%s: %s); the run goes on without it", name, type(error).__name__, error)
        return []


def _tensorboard(folder: Path, resume_step: int) -> Tracker:
    from largeformer.tracking.tensorboard import TensorBoardTracker

    return TensorBoardTracker(folder / "tensorboard", resume_step)


def _wandb(tracking: TrackingConfig, folder: Path, run_name: str, record: Mapping[str, Any], run_id: str, resume_step: int) -> Tracker:
    from largeformer.tracking.wandb import WandbTracker

    return WandbTracker(tracking.wandb, folder, run_name, record, run_id, resume_step)


def _sweep_run(environ: Mapping[str, str]) -> str | None:
    """The run id that the agent of a W&B sweep has drawn for this process."""
    return environ.get("WANDB_RUN_ID") if environ.get("WANDB_SWEEP_ID") else None
