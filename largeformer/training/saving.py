"""When and where checkpoints are written, and what becomes of the older ones."""

from __future__ import annotations

from pathlib import Path

from largeformer.config.schema import CheckpointConfig
from largeformer.tracking.tracker import Tracker
from largeformer.training.checkpointing import TrainingState, save_checkpoint
from largeformer.training.engine import Engine


class Checkpoints:
    """The checkpoints of one run, under `folder`."""

    def __init__(self, folder: Path, engine: Engine, tracker: Tracker, config_yaml: str, settings: CheckpointConfig) -> None:
        self._folder, self._engine, self._tracker, self._config_yaml, self._settings = folder, engine, tracker, config_yaml, settings

    def save(self, state: TrainingState) -> None:
        path = save_checkpoint(self._folder, self._engine, state, self._config_yaml, self._settings.keep_last)
        self._tracker.event("saved", state.progress.step, checkpoint=path.name)

    def poll(self) -> None:
        """Nothing is written behind the training."""

    def finish(self) -> None:
        """Nothing is left to be written."""
