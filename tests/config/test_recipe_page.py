"""docs/recipe.md lists the keys of its sections: each one, with the default that it has, and no other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic_core import to_jsonable_python

from largeformer.config.schema import Recipe
from largeformer.config.section import Section

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"
SECTIONS = ("run", "model", "parallel", "train", "optimizer", "tokenizer", "checkpoint", "generate")
REQUIRED = "required"
_ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)


def keys_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key and default of every field, those of sections within among them, such as `early_stopping.patience`."""
    for name, field in section.model_fields.items():
        yield prefix + name, REQUIRED if field.is_required() else to_jsonable_python(field.get_default(call_default_factory=True))
        kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from keys_of(kind, f"{prefix}{name}.")


def listed(section: str) -> dict[str, Any]:
    """Key and default as the page has them under the section's heading."""
    _, found, below = PAGE.read_text(encoding="utf-8").partition(f"\n## `{section}`\n")
    assert found, f"docs/recipe.md has no heading `{section}`"
    rows = _ROW.findall(below.partition("\n## ")[0])
    assert len({key for key, *_ in rows}) == len(rows), f"a key stands twice under {section}"
    return {key: yaml.safe_load(default) for key, default, _ in rows}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_stands_in_the_page_with_its_default(section: str) -> None:
    kind = Recipe.model_fields[section].annotation
    assert isinstance(kind, type)
    assert listed(section) == dict(keys_of(kind))


def test_every_other_section_is_named_with_its_page() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    assert [name for name in Recipe.model_fields if name not in SECTIONS and f"`{name}`" not in table] == []
    assert [page for page in re.findall(r"\]\(([\w.]+)", table) if not (PAGE.parent / page).is_file()] == []
