"""The section `distill`: a student trained on what a teacher says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from largeformer.config.chain import TrainedSection
from largeformer.config.section import Positive, PositiveInt, Section

if TYPE_CHECKING:
    from largeformer.config.schema import Recipe

LayerNumber = Annotated[int, Field(ge=0)]


class StudentConfig(Section):
    """Where the student comes from.

    `init`: `previous`: the model of the stage before; `scratch`: the recipe's model, newly initialised; `teacher_layers`: some layers of
    the teacher. `model`: for `scratch`, what its shape has otherwise than the section `model`; for `teacher_layers`, `num_layers` alone.
    `layers`: which of the teacher's, numbered from 0; null: spread evenly, the first and the last among them.
    """

    init: Literal["previous", "scratch", "teacher_layers"] = "previous"
    model: dict[str, Any] = Field(default_factory=dict)
    layers: tuple[LayerNumber, ...] | None = None


class HiddenConfig(Section):
    """Hidden states that follow the teacher's, added to the loss `weight` times.

    `loss`: `cosine`: 1 - cosine; `mse`: the mean over the width. `layers`: pairs of a student's and a teacher's layer, numbered from 0;
    null: every layer of the student, spread evenly over the teacher's, the last with the last. Where widths differ a projection is
    trained along.
    """

    weight: Positive = 1.0
    loss: Literal["cosine", "mse"] = "cosine"
    layers: tuple[tuple[LayerNumber, LayerNumber], ...] | None = None


class OfflineConfig(Section):
    """What the teacher says is written down once, and the teacher need not be in memory while the student learns.

    `top_k`: its most probable ids of each token; null: all. `precision`: of their log-probabilities. `folder`: null: `teacher_answers`
    of the run's folder.
    """

    top_k: PositiveInt | None = 64
    precision: Literal["fp32", "fp16"] = "fp16"
    folder: str | None = None


class LessonConfig(Section):
    """What is learnt of a teacher: loss = `alpha` * `temperature`^2 * `divergence` + (1 - `alpha`) * cross-entropy."""

    temperature: Positive = 3.0
    alpha: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = 0.7
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl"


class DistillConfig(LessonConfig, TrainedSection):
    """`teacher`: a stage of this run, or the path of a run, a stage or a checkpoint; null: the run's first trained model. `seed`: of new
    weights and of the order of samples; null: the run's."""

    teacher: str | None = None
    student: StudentConfig = StudentConfig()
    hidden: HiddenConfig | None = None
    offline: OfflineConfig | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] | None = None


def distill_problems(recipe: Recipe) -> Iterator[str]:
    """What does not go together in the section, or with the rest of the recipe."""
    section, train = recipe.distill, recipe.train
    student = section.student
    if student.layers is not None and student.init != "teacher_layers":
        yield f"distill.student.layers are the teacher's, and distill.student.init is {student.init}: set it to teacher_layers"
    if student.model and student.init == "previous":
        yield "distill.student.model changes a shape that comes from the stage before (distill.student.init previous): leave it out"
    if student.init == "teacher_layers" and (others := sorted(set(student.model) - {"num_layers"})):
        yield (
            f"distill.student.model.{others[0]} cannot differ from the teacher's, whose layers the student has (distill.student.init "
            "teacher_layers): only num_layers can; distill.student.init scratch takes any shape"
        )
    if section.offline is not None and recipe.data.sampling.type == "loss":
        yield "distill.offline needs the order of samples beforehand, and data.sampling.type loss makes it as it goes: use another of them"
    if section.hidden is None:
        return
    if section.offline is not None:
        yield "distill.hidden needs the teacher's hidden states, which distill.offline does not keep: leave one of them out"
    if train.recompute_granularity == "full":
        yield "distill.hidden does not go with train.recompute_granularity full, which runs layers twice: use selective, or null"
    if train.compile:
        yield "distill.hidden does not go with train.compile true: leave one of them out"
