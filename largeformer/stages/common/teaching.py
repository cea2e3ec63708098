"""A training that follows a teacher: its batches go past the teacher before each step, and its loss asks what the teacher has said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from largeformer.config.distill import LessonConfig
from largeformer.stages.common.training import Accompanied
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.parallel.batch import Batch
    from largeformer.training.engine import Engine
    from largeformer.training.trainer import BatchSource


class Taught:
    """A `BatchSource` whose batches go past the teacher."""

    def __init__(self, batches: BatchSource, begin: Callable[[Sequence[Batch]], list[Batch]]) -> None:
        self._batches, self._begin = batches, begin

    @property
    def consumed_samples(self) -> int:
        return self._batches.consumed_samples

    def next(self) -> list[Batch]:
        return self._begin(self._batches.next())


class Tutor:
    """A teacher in memory, of whose answers alone a training learns. teacher: its chunks on this rank, at the training's layout."""

    def __init__(self, teacher: Sequence[GPT], settings: LessonConfig, world: World) -> None:
        from largeformer.compression.distillation.figures import Figures
        from largeformer.compression.distillation.teacher import Teacher

        self._settings, self._world = settings, world
        self._teacher = Teacher(teacher, world.groups, settings.temperature)
        self._figures = Figures(("kd_loss", "ce_loss"), world.groups)

    def follow(self, chunks: Sequence[GPT]) -> None:
        """From here on the loss of `chunks` in training is that of the lesson."""
        from largeformer.compression.distillation.loss import DistillationLoss

        self._teacher.accompany(chunks)
        if self._world.groups.is_last_stage:
            chunks[-1].output_layer.next_loss = DistillationLoss(self._settings, self._teacher.answer, self._figures).next

    def accompany(self, engine: Engine, data: BatchSource) -> Accompanied:
        """For `TrainingJob.accompany`."""
        return Accompanied(Taught(data, self._begin), figures=self._figures.means)

    def _begin(self, batches: Sequence[Batch]) -> list[Batch]:
        here = [batch.to(self._world.device) for batch in batches]
        self._figures.begin()
        self._teacher.begin(here)
        return here
