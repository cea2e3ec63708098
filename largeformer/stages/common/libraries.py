"""The libraries that only the last stages of a chain need: asked for before its first begins, not after hours of training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from largeformer.artifact import Artifact
from largeformer.config.chain import StageEntry, at_stage
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.common.claim import identity_in

_NEED_LIBRARIES = ("quantize", "export")


def check_libraries(recipe: Recipe, *, fresh: bool) -> None:
    """Raise BadInputError with each library that a stage of `run.stages` will want and that is not installed. Stages that are finished, as
    all before them are, want none, unless `fresh`. None is imported; ranks of other machines than rank 0's do not look."""
    info = discover(os.environ)
    if info.rank >= info.local_world_size:
        return
    entries = list(recipe.run.stages)
    while not fresh and entries and _is_done(recipe, entries[0]):
        entries.pop(0)
    problems = [problem for entry in entries if entry.stage in _NEED_LIBRARIES for problem in _problems(at_stage(recipe, entry), entry)]
    if problems:
        raise BadInputError(list(dict.fromkeys(problems)))


def _is_done(recipe: Recipe, entry: StageEntry) -> bool:
    """Whether the stage has finished, and with its section as it is now, as far as its folder says."""
    folder = Path(recipe.run.output_dir) / entry.name
    if Artifact.read(folder) is None:
        return False
    section, held = (about.get(entry.stage) for about in (at_stage(recipe, entry).identity(entry.stage), identity_in(folder, entry.stage)))
    return held in (None, section)


def _problems(recipe: Recipe, entry: StageEntry) -> Iterator[str]:
    from largeformer.compression.quantization.schemes import check_library
    from largeformer.export.formats import library_problems

    if entry.stage == "export":
        yield from library_problems(recipe.export, recipe.model)
        return
    try:
        check_library()
    except BadInputError as missing:
        yield from missing.problems
