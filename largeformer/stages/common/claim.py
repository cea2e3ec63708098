"""A stage's folder belongs to one recipe: it is gone on with by the same, and never overwritten by another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from largeformer.artifact import MANIFEST, identity_hash, write_atomically
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError

CONFIG = "config.yaml"
_SHOWN = 3


def claim(folder: Path, recipe: Recipe, stage: str, fresh: bool) -> None:
    """Make `folder` the recipe's, and write the resolved recipe into it. On one process only.

    Raises BadInputError where it belongs to a recipe of another identity; with `fresh` that folder is set aside instead.
    """
    wanted = recipe.identity(stage)
    there = identity_in(folder, stage) if holds_results(folder) else None
    if there is not None and there != wanted:
        if not fresh:
            raise belongs_to_another(folder, there, wanted)
        set_aside(folder)
    if identity_in(folder, stage) != wanted:
        forget_rewinds(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, recipe_yaml(recipe).encode())


def forget_rewinds(folder: Path) -> None:
    """Samples that another recipe left out of a training that saved nothing: they are not this one's."""
    from largeformer.training.rewind import FILE

    (folder / FILE).unlink(missing_ok=True)


def set_aside(folder: Path) -> None:
    """Rename `folder` to the first of `folder.old-1`, `.old-2`, ... that is not taken."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(old)


def holds_results(folder: Path) -> bool:
    """A folder in which nothing was finished or saved is free: a mistake in a recipe must not stand in the way of its mending."""
    return (folder / MANIFEST).exists() or any(folder.glob("checkpoints/step_*"))


def identity_in(folder: Path, stage: str) -> dict[str, Any]:
    """The identity that the folder was claimed with; empty where it cannot be told."""
    try:
        return Recipe.model_validate(yaml.safe_load((folder / CONFIG).read_text())).identity(stage)
    except (OSError, ValidationError, yaml.YAMLError):
        return {}


def belongs_to_another(folder: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> BadInputError:
    differences = list(_differences(there, wanted))
    shown = "; ".join(differences[:_SHOWN]) + (f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else "")
    return BadInputError(
        f"{folder} belongs to another recipe (identity {identity_hash(there)}, this one is {identity_hash(wanted)}: {shown}). "
        "Choose another run.output_dir, or pass --fresh to set the old folder aside"
    )


def _differences(there: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in {**there, **wanted}:
        old, new = there.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old}, is {new}"
