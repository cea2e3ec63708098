"""Who learns from whom: teacher and student of a `distill` stage, found and checked before any work.

The student trains on the run's own prepared text; both must read it by the same tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact
from largeformer.config.chain import StageEntry, at_stage, merged
from largeformer.config.checks import recipe_problems
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.layout import stage_layers
from largeformer.stages.common import prepared_data
from largeformer.stages.common.inputs import Input, input_of, weights_named
from largeformer.stages.common.weights import Source, find_source, named_model, shaped_like


@dataclass(frozen=True)
class Lesson:
    """given: the student's recipe and its parents. teacher: its recipe, shaped like its checkpoint, and where that is. start: the
    checkpoint that the student's weights come from, None where they are new; named: what a weight is called in there. pairs: the layers
    whose hidden states are compared, the student's first."""

    given: Input
    teacher: Recipe
    teacher_source: Source
    taught_by: Artifact | None
    start: Path | None
    named: Callable[[str], str]
    pairs: tuple[tuple[int, int], ...]

    def origin(self) -> dict[str, Any]:
        """What makes the result what it is."""
        further = {"teacher": self.taught_by} if self.taught_by is not None else {}
        whole = self.given.recipe.identity("pretrain")
        about = {key: whole[key] for key in ("model", "tokenizer", "data")}
        teacher = weights_named(self.teacher_source.checkpoint, self.taught_by)
        return {**self.given.origin(**further), "teacher_checkpoint": teacher, **about}


@dataclass(frozen=True)
class _Beginning:
    """recipe: the student's. source, made_by: whose identity is in the student's. start, named: see `Lesson`."""

    recipe: Recipe
    source: Source
    made_by: Artifact | None
    start: Path | None
    named: Callable[[str], str] = str


def lesson_of(recipe: Recipe, entry: StageEntry, source: Path | None, prepared: Artifact) -> Lesson:
    """Collective. Raises BadInputError with everything that stands against it."""
    from largeformer.parallel.agreement import from_main

    own = at_stage(recipe, entry)
    taught_from = _teacher_source(own, source)
    taught_by = Artifact.read(taught_from.checkpoint.parent.parent)
    teacher = _teacher_recipe(own, taught_from)
    if own.distill.student.init == "previous":
        found = input_of(recipe, entry, source)
        beginning = _Beginning(found.recipe, found.source, found.made_by, found.source.checkpoint)
        if found.source.checkpoint.resolve() == taught_from.checkpoint.resolve():
            raise BadInputError(
                f"the student would be the teacher itself, {found.source.checkpoint}: put a stage that changes it before {entry.name} in "
                "run.stages, or set distill.student.init to teacher_layers or scratch"
            )
    else:
        beginning = _new_student(own, teacher, taught_from, taught_by)
    tokenizers = {"the student": beginning.source.prepared, "the teacher": taught_from.prepared}
    _check_vocabulary(own, beginning.recipe, teacher, tokenizers, prepared)
    # Text and tokenizer are the run's own, whatever the checkpoint was trained on.
    seed = own.run.seed if own.distill.seed is None else own.distill.seed
    run = own.run.model_copy(update={"seed": seed})
    student = beginning.recipe.model_copy(update={"tokenizer": own.tokenizer, "data": own.data, "run": run})
    teacher = _beside(teacher, student)
    folder = Path(own.run.output_dir) / entry.name
    text = from_main(lambda: prepared_data.content(prepared))
    given = Input(student, entry, Source(beginning.source.checkpoint, prepared), beginning.made_by, folder, text)
    return Lesson(given, teacher, taught_from, taught_by, beginning.start, beginning.named, pairs_of(student, teacher))


def _teacher_source(recipe: Recipe, source: Path | None) -> Source:
    """Where the teacher is: as the section names it; else, for a student that no stage has made, as --from (`source`) does."""
    from largeformer.parallel.agreement import is_main

    settings = recipe.distill
    if source is None or settings.student.init == "previous":
        return find_source(recipe, _teacher_folder(recipe))
    if settings.teacher is None:
        return find_source(recipe, source)
    folder = _teacher_folder(recipe)
    if is_main() and folder.resolve() != source.resolve():
        print(f"the teacher is distill.teacher {settings.teacher}, not --from {source}: the student comes from no stage", flush=True)
    return find_source(recipe, folder)


def _teacher_folder(recipe: Recipe) -> Path:
    """Where the section names the teacher: a stage of this run, or a path; by default the run itself, and of it what was trained first."""
    run, name = Path(recipe.run.output_dir), recipe.distill.teacher
    if name is None:
        return run
    folder = named_model(recipe, name)
    if not folder.exists():
        raise BadInputError(
            f"distill.teacher {name} is neither a stage of {run} that has left checkpoints nor a folder: name a run, a stage or a "
            "checkpoint"
        )
    return folder


def _teacher_recipe(recipe: Recipe, source: Source) -> Recipe:
    try:
        return shaped_like(recipe, source)
    except BadInputError as error:
        raise BadInputError([f"the teacher {source.checkpoint}: {problem}" for problem in error.problems]) from None


def _beside(teacher: Recipe, student: Recipe) -> Recipe:
    """The teacher as it is built next to this student: its vocabulary padded alike, so that ranks share it alike. Raises BadInputError
    where its positions end before the student's."""
    own, theirs = student.model, teacher.model
    if theirs.position_embedding == "learned" and theirs.seq_length < own.seq_length:
        raise BadInputError(
            f"the teacher has learned positions for model.seq_length {theirs.seq_length}, and the student reads {own.seq_length}: give the "
            "student a shorter model.seq_length"
        )
    model = theirs.model_copy(update={"make_vocab_size_divisible_by": own.make_vocab_size_divisible_by})
    return student.model_copy(update={"model": model})


def _new_student(recipe: Recipe, teacher: Recipe, source: Source, taught_by: Artifact | None) -> _Beginning:
    """A student that no stage has made: of the teacher's layers, or new. Raises BadInputError."""
    settings = recipe.distill.student
    if settings.init == "scratch":
        student = recipe.model_copy(update={"model": merged(recipe.model, settings.model, "distill.student.model")})
        beginning = _Beginning(student, source, taught_by, None)
    else:
        layers = chosen_layers(recipe, teacher.model.num_layers)
        student = recipe.model_copy(update={"model": teacher.model.model_copy(update={"num_layers": len(layers)})})
        beginning = _Beginning(student, source, taught_by, source.checkpoint, _layer_names(layers))
    if problems := recipe_problems(student):
        raise BadInputError([f"the student: {problem}" for problem in problems])
    return beginning


def chosen_layers(recipe: Recipe, there: int) -> Sequence[int]:
    settings = recipe.distill.student
    wanted = settings.model.get("num_layers", len(settings.layers) if settings.layers is not None else recipe.model.num_layers)
    if not isinstance(wanted, int) or wanted < 1:
        raise BadInputError(f"distill.student.model.num_layers {wanted!r} is not a number of layers: give an integer above 0")
    if wanted > there:
        raise BadInputError(
            f"the student has {wanted} layers (num_layers) and the teacher {there}: it cannot have more than those it is made of"
        )
    if settings.layers is None:
        return [round(i * (there - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]
    if len(settings.layers) != wanted or list(settings.layers) != sorted(set(settings.layers)) or settings.layers[-1] >= there:
        raise BadInputError(
            f"distill.student.layers {list(settings.layers)} must be {wanted} different ones of the teacher's layers 0 to {there - 1}, in "
            "order"
        )
    return settings.layers


def _layer_names(layers: Sequence[int]) -> Callable[[str], str]:
    """The teacher's name of a student's weight."""

    def named(key: str) -> str:
        prefix, decoder, rest = key.partition("decoder.layers.")
        number, _, name = rest.partition(".")
        return f"{prefix}{decoder}{layers[int(number)]}.{name}" if decoder else key

    return named


def _check_vocabulary(own: Recipe, student: Recipe, teacher: Recipe, others: dict[str, Artifact], prepared: Artifact) -> None:
    sizes = {"this run": own, "the student": student, "the teacher": teacher}
    by_size = {who: recipe.tokenizer.vocab_size for who, recipe in sizes.items()}
    problems = [
        f"{who} has a vocabulary of {size} ids (tokenizer.vocab_size) and the teacher one of {by_size['the teacher']}: distillation "
        "compares them id by id, so both must have the same tokenizer"
        for who, size in by_size.items()
        if size != by_size["the teacher"]
    ]
    ours = prepared.metrics.get("tokenizer_sha256")
    problems += [
        f"{who} reads by another tokenizer ({theirs}) than this run's text was cut by ({ours}): prepare this run with that one "
        "(tokenizer.model), or choose another teacher"
        for who, artifact in others.items()
        if (theirs := artifact.metrics.get("tokenizer_sha256")) != ours and None not in (theirs, ours)
    ]
    if problems:
        raise BadInputError(problems)


def pairs_of(student: Recipe, teacher: Recipe) -> tuple[tuple[int, int], ...]:
    """Raises BadInputError where a layer is not there, or the two of a pair lie on different pipeline stages."""
    hidden = student.distill.hidden
    if hidden is None:
        return ()
    own, theirs = student.model.num_layers, teacher.model.num_layers
    even = tuple((i, max(round((i + 1) * theirs / own) - 1, 0)) for i in range(own))
    pairs = even if hidden.layers is None else hidden.layers
    if problems := list(_pair_problems(pairs, student, teacher)):
        raise BadInputError(problems)
    return pairs


def _pair_problems(pairs: Sequence[tuple[int, int]], student: Recipe, teacher: Recipe) -> Iterator[str]:
    if len({own for own, _ in pairs}) != len(pairs) or not pairs:
        yield f"distill.hidden.layers {_shown(pairs)} must give each of some layers of the student one of the teacher's, once"
    homes = [_homes(recipe) for recipe in (student, teacher)]
    for pair in pairs:
        for number, home, who in zip(pair, homes, ("student", "teacher"), strict=True):
            if number not in home:
                yield f"distill.hidden.layers {list(pair)}: the {who} has the layers 0 to {len(home) - 1}"
    both = [(own, theirs) for own, theirs in pairs if own in homes[0] and theirs in homes[1]]
    apart = [(own, theirs) for own, theirs in both if homes[0][own] != homes[1][theirs]]
    if apart:
        yield (
            f"distill.hidden.layers {_shown(apart)}: the two layers of a pair must lie on the same of "
            f"parallel.pipeline_model_parallel_size {student.parallel.pipeline_model_parallel_size} stages: pair others, or use fewer "
            "stages"
        )


def _homes(recipe: Recipe) -> dict[int, int]:
    """Layer -> pipeline stage."""
    p = recipe.parallel
    stages = stage_layers(
        recipe.model.num_layers,
        p.pipeline_model_parallel_size,
        p.virtual_pipeline_model_parallel_size or 1,
        p.num_layers_in_first_pipeline_stage,
        p.num_layers_in_last_pipeline_stage,
    )
    return {layer: stage for stage, chunks in enumerate(stages) for chunk in chunks for layer in chunk}


def _shown(pairs: Sequence[tuple[int, int]]) -> str:
    return str([list(pair) for pair in pairs])
