"""`distill`: a student trained on what a teacher says, in `<output_dir>/<stage name>/`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact, identity_hash
from largeformer.config.chain import StageEntry, at_stage, entry_named
from largeformer.config.schema import Recipe
from largeformer.config.size import model_parameters
from largeformer.stages import prepare
from largeformer.stages.common import interruptions
from largeformer.stages.common.feeding import check_text
from largeformer.stages.common.inputs import finished, take
from largeformer.stages.common.interruptions import CutShort
from largeformer.stages.common.sparse import sparsity_trained
from largeformer.stages.common.teaching import Taught
from largeformer.stages.common.training import Accompanied, TrainingJob, train
from largeformer.stages.common.world import World, check_world, enter_world, reporting
from largeformer.stages.distill_lessons import live_teacher, written_answers
from largeformer.stages.distill_pupils import Lesson, lesson_of

if TYPE_CHECKING:
    from largeformer.compression.distillation.answers import AnswerReader
    from largeformer.compression.distillation.hidden import HiddenMatching
    from largeformer.compression.distillation.teacher import Teacher
    from largeformer.models.gpt import GPT
    from largeformer.models.shards import Shard
    from largeformer.parallel.batch import Batch
    from largeformer.training.engine import Engine
    from largeformer.training.trainer import BatchSource, Training

STAGE = "distill"


def run(
    recipe: Recipe,
    source: Path | None = None,
    *,
    fresh: bool = False,
    entry: StageEntry | None = None,
    cut_short: CutShort | None = None,
) -> Artifact | None:
    """Train the student. `source`: a run, a stage or a checkpoint that it comes from, by default the stage before. Returns the artifact,
    or None where `exit_iteration` came before the end. Raises BadInputError, StopRequested where a signal or the clock stopped it, and
    StageFailed where a pruned weight came back."""
    entry = entry or entry_named(recipe, STAGE)
    as_set = at_stage(recipe, entry)
    check_world(as_set)
    ended = (cut_short or interruptions.cut_short(recipe)).get(entry.name)
    prepared = prepare.run_or_wait(recipe)
    with reporting(recipe, entry.name) as report, enter_world(as_set) as world:
        lesson = lesson_of(recipe, entry, source, prepared)
        artifact = world.from_main(lambda: finished(lesson.given, lesson.origin(), fresh=fresh))
        if artifact is None:
            check_text(lesson.given.recipe, world, prepared)
            job = _job(lesson, world, prepared)
            world.from_main(lambda: take(lesson.given, lesson.origin()))
            artifact = train(lesson.given.recipe, world, job, ended)
        if artifact is None:
            report("requeue")
    return artifact


def _job(lesson: Lesson, world: World, prepared: Artifact) -> TrainingJob:
    given = lesson.given
    parents = {name: artifact for name, artifact in given.parents.items() if name != prepared.kind}
    if lesson.taught_by is not None:
        parents["teacher"] = lesson.taught_by
    course = _Course(lesson, world)
    return TrainingJob(
        STAGE,
        given.folder,
        identity_hash(lesson.origin()),
        prepared,
        parents,
        start=lesson.start,
        named=lesson.named,
        extend=course.extend,
        alter=course.alter,
        accompany=course.accompany,
        measure=course.measure,
    )


class _Course:
    """The teacher, and what it does to each student that is assembled: one, or one more after each rewind."""

    def __init__(self, lesson: Lesson, world: World) -> None:
        from largeformer.compression.distillation.figures import Figures

        self._lesson, self._world, self._groups = lesson, world, world.groups
        self._settings, recipe = lesson.given.recipe.distill, lesson.given.recipe
        offline = self._settings.offline is not None
        self._teacher: Teacher | AnswerReader = written_answers(lesson, world) if offline else live_teacher(lesson, world)
        hidden = ("hidden_loss",) if lesson.pairs else ()
        self._figures = Figures(("kd_loss", "ce_loss", *hidden), world.groups, hidden if recipe.parallel.sequence_parallel else ())
        self._matching: HiddenMatching | None = None

    def extend(self, chunks: Sequence[GPT]) -> list[Shard]:
        from largeformer.compression.distillation.hidden import add_projections

        recipe = self._lesson.given.recipe
        return add_projections(chunks, self._lesson.pairs, self._lesson.teacher.model.hidden_size, self._groups, recipe.run.seed)

    def alter(self, chunks: Sequence[GPT], shards: Sequence[Shard]) -> None:
        from largeformer.compression.distillation.hidden import HiddenMatching
        from largeformer.compression.distillation.loss import DistillationLoss
        from largeformer.compression.distillation.teacher import Teacher
        from largeformer.training.masks import hold_zeros

        settings, lesson = self._settings, self._lesson
        if lesson.start is not None:
            hold_zeros(lesson.start, shards, lesson.named)
        self._teacher.accompany(chunks)
        if self._groups.is_last_stage:
            chunks[-1].output_layer.next_loss = DistillationLoss(settings, self._teacher.answer, self._figures).next
        if settings.hidden is not None:
            assert isinstance(self._teacher, Teacher), "what is written down holds no hidden states"
            self._matching = HiddenMatching(settings.hidden, lesson.pairs, chunks, self._teacher.states, self._groups, self._figures)

    def accompany(self, engine: Engine, data: BatchSource) -> Accompanied:
        return Accompanied(Taught(data, lambda batches: self._begin(engine, batches)), figures=self._figures.means)

    def _begin(self, engine: Engine, batches: Sequence[Batch]) -> list[Batch]:
        here = [batch.to(self._world.device) for batch in batches]
        self._figures.begin()
        if self._matching is not None:
            self._matching.scale.value = engine.backward_scale(here)
        self._teacher.begin(here)
        return here

    def measure(self, training: Training) -> dict[str, Any]:
        recipe, teacher = self._lesson.given.recipe, self._lesson.teacher
        settings = self._settings
        return {
            **self._figures.means(),
            "temperature": settings.temperature,
            "alpha": settings.alpha,
            "divergence": settings.divergence,
            "student_init": settings.student.init,
            "parameters": model_parameters(recipe.model, recipe.tokenizer.vocab_size),
            "teacher_parameters": model_parameters(teacher.model, teacher.tokenizer.vocab_size),
            **(
                {}
                if self._lesson.start is None
                else sparsity_trained(self._world, self._lesson.start, self._lesson.given.folder, self._lesson.named)
            ),
        }
