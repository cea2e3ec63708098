"""The teacher of a `distill` stage: in memory, or what it has said in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import file_sha256, identity_hash
from largeformer.config.schema import Recipe
from largeformer.errors import StageFailed
from largeformer.stages.common import prepared_data
from largeformer.stages.common.feeding import samples_to_train_on, training_batches
from largeformer.stages.common.weights import load_model
from largeformer.stages.common.world import World
from largeformer.stages.distill_pupils import Lesson
from largeformer.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from largeformer.compression.distillation.answers import AnswerReader
    from largeformer.compression.distillation.teacher import Teacher

FOLDER = "teacher_answers"


def live_teacher(lesson: Lesson, world: World) -> Teacher:
    """With the states that the lesson's pairs ask for. Collective."""
    from largeformer.compression.distillation.hidden import layers_here
    from largeformer.compression.distillation.teacher import Teacher

    chunks = load_model(lesson.teacher, world, lesson.teacher_source.checkpoint)
    here = layers_here(chunks, world.groups)
    keeps = {own: here[theirs] for own, theirs in lesson.pairs if theirs in here}
    return Teacher(chunks, world.groups, lesson.given.recipe.distill.temperature, keeps)


def written_answers(lesson: Lesson, world: World) -> AnswerReader:
    """The answers to all that the student will read; what is missing of them is asked for first, with the teacher in memory as long.
    Collective. Raises BadInputError where the folder holds others, StopRequested on a signal: what was said is kept."""
    from largeformer.compression.distillation.answers import AnswerReader, AnswerWriter, claim, index
    from largeformer.compression.distillation.dictation import Dictation

    recipe = lesson.given.recipe
    offline = recipe.distill.offline
    assert offline is not None
    identity = world.from_main(lambda: answers_identity(lesson))
    named = Path(offline.folder) if offline.folder is not None else None
    folder = named or Path(recipe.run.output_dir) / FOLDER / identity_hash(identity)[:12]
    world.from_main(lambda: claim(folder, identity))
    where, until = world.from_main(lambda: index(folder)), samples_to_train_on(recipe)
    if any(sample not in where for sample in range(until)):
        if world.info.is_main:
            print(f"the teacher's answers to {until:,} samples go to {folder}", flush=True)
        vocabulary, signals = recipe.tokenizer.vocab_size, StopSignals.current()
        top_k = min(offline.top_k or vocabulary, vocabulary)
        teacher = live_teacher(lesson, world)
        dictation = Dictation(teacher, world.groups, world.device, vocabulary, recipe.train.loss_chunk_size, top_k)
        text = training_batches(recipe, world, lesson.given.source.prepared)(0)
        writer = AnswerWriter(folder, offline.precision)
        try:
            ended = dictation.write(text, until, where, writer, lambda: signals.received)
        except OSError as error:
            told = f"the teacher's answers cannot be written to {folder} ({error}): free its disk and start again; what was said is kept"
            raise StageFailed([told]) from error
        if not ended:
            raise StopRequested("stopped by a signal while the teacher's answers were written")
        where = world.from_main(lambda: index(folder))
    return AnswerReader(folder, where)


def _scores(recipe: Recipe) -> dict[str, str]:
    """Hashes of the files that a curriculum by loss is sorted by."""
    named = getattr(recipe.data.sampling, "scores", None)
    if named is None:
        return {}
    folder = Path(named).expanduser()
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*.npy"))}


def answers_identity(lesson: Lesson) -> dict[str, Any]:
    """What the answers depend on: never the layout or the student."""
    from largeformer.checkpoint.manifest import read_manifest

    recipe, source = lesson.given.recipe, lesson.teacher_source
    offline = recipe.distill.offline
    assert offline is not None
    files = read_manifest(source.checkpoint)
    text = {key: recipe.identity("pretrain")[key] for key in ("tokenizer", "data", "seed")}
    return {
        "teacher": identity_hash({name: digest.sha256 for name, digest in files.items() if name.startswith("weights/")}),
        "text": identity_hash({**text, "content": prepared_data.content(lesson.given.source.prepared), "scores": _scores(recipe)}),
        "seq_length": recipe.model.seq_length,
        "samples": samples_to_train_on(recipe),
        "computed_in": recipe.train.precision,
        "temperature": recipe.distill.temperature,
        **offline.model_dump(include={"top_k", "precision"}),
    }
