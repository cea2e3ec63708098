"""The recipe's chain of stages: what stands in `run.stages`, and the recipe as each stage of it reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from pydantic import Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticKnownError

from largeformer.config.section import Section
from largeformer.config.sentences import sentences
from largeformer.errors import BadInputError

if TYPE_CHECKING:
    from largeformer.config.schema import Recipe

StageName = Literal["prepare", "pretrain", "prune", "distill", "quantize", "evaluate", "export"]
_ONCE = ("prepare", "pretrain")
_TAKEN = (*get_args(StageName), "import", "teacher_answers")
_S = TypeVar("_S", bound=Section)


class TrainedSection(Section):
    """A section of a stage that trains. `train`, `optimizer`: what this stage has otherwise than the recipe's sections of these names."""

    train: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether the stage trains at all, as it is set."""
        return True


class StageEntry(Section):
    """One of `run.stages`: `distill`, or `{distill: {name: distill-2, alpha: 0.5}}`: a folder of its own, and keys of the section `distill`
    that this one has otherwise."""

    stage: StageName
    name: str
    settings: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in get_args(StageName):  # told here, so that the sentence names the entry
                raise PydanticKnownError("literal_error", {"expected": ", ".join(map(repr, get_args(StageName)))})
            return {"stage": value, "name": value}
        if isinstance(value, dict) and len(value) == 1:
            ((stage, keys),) = value.items()
            if isinstance(keys, dict):
                return {"stage": stage, "name": keys.get("name", stage), "settings": {k: v for k, v in keys.items() if k != "name"}}
        return value

    @model_serializer
    def _as_written(self) -> Any:
        if self.name == self.stage and not self.settings:
            return self.stage
        return {self.stage: {"name": self.name, **self.settings}}

    @classmethod
    def of(cls, stage: str, name: str | None = None) -> StageEntry:
        return cls.model_validate({stage: {"name": name or stage}})


def at_stage(recipe: Recipe, entry: StageEntry) -> Recipe:
    """The recipe as this stage reads it: its own section with the entry's settings, `train` and `optimizer` with what that section has
    otherwise. Raises BadInputError for a key or value that does not fit."""
    section = getattr(recipe, entry.stage, None)
    if section is None:
        if entry.settings:
            raise BadInputError(
                f"run.stages gives {entry.name} the keys {', '.join(entry.settings)}: the stage {entry.stage} has none but name"
            )
        return recipe
    section = merged(section, entry.settings, entry.name)
    update: dict[str, Any] = {entry.stage: section}
    if isinstance(section, TrainedSection):
        update |= {part: merged(getattr(recipe, part), getattr(section, part), f"{entry.name}.{part}") for part in ("train", "optimizer")}
    return recipe.model_copy(update=update)


def entry_named(recipe: Recipe, stage: str) -> StageEntry:
    """The entry of `run.stages` for the command `stage`: the first of that kind, else one with its defaults."""
    return next((entry for entry in recipe.run.stages if entry.stage == stage), None) or StageEntry.of(stage)


def chain_problems(recipe: Recipe) -> Iterator[str]:
    """Entries whose names clash or are no folder names, and settings that do not fit."""
    seen: set[str] = set()
    for entry in recipe.run.stages:
        if entry.name in seen:
            other = f"{{{entry.stage}: {{name: {entry.name}-2}}}}"
            yield f"run.stages has two stages named {entry.name}: give one of them another name, as in {other}"
        elif not re.fullmatch(r"[A-Za-z0-9][\w.-]*", entry.name):
            yield f"run.stages names a stage {entry.name!r}, which is no plain folder name: use letters, digits, - and _"
        elif (entry.name in _TAKEN and entry.name != entry.stage and entry.stage not in _ONCE) or ".old-" in entry.name:
            yield f"run.stages names a {entry.stage} {entry.name}, which is the folder of something else: choose another name"
        elif entry.stage in _ONCE and entry.name != entry.stage:
            yield f"run.stages names its {entry.stage} {entry.name}: a run has one, in a folder of the stage's own name; leave the name out"
        seen.add(entry.name)
        try:
            at_stage(recipe, entry)
        except BadInputError as error:
            yield from error.problems


def merged(section: _S, changes: Mapping[str, Any], place: str) -> _S:
    """`section` with some keys otherwise. Raises BadInputError, with the place that gives them, where they do not fit."""
    if not changes:
        return section
    raw = {**section.model_dump(mode="json"), **changes}
    try:
        return type(section).model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        raise BadInputError([f"in {place}: {text}" for text in sentences(error, type(section))]) from None
