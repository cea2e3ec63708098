"""Pydantic's findings as sentences for the reader of a recipe: the dotted key, the value, what was expected, the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text (put it in quotes)",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def sentences(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each finding of `error`, in the order of the keys. `model` is the tree that was validated."""
    known = list(dotted_keys(model))
    findings = findings_of(error, model)
    places = [finding["loc"] for finding in findings]
    told = []
    for finding in findings:
        place = finding["loc"]
        # A list whose items are all wrong is reported once more as too short.
        echo = finding["type"] == "too_short" and any(other[: len(place)] == place != other for other in places)
        if not echo:
            told.append(_sentence(finding, known))
    return told


def findings_of(error: ValidationError, model: type[BaseModel]) -> list[dict[str, Any]]:
    """Pydantic's findings, each `loc` a place in the input: without the tag that says which section of a union was taken."""
    known = set(dotted_keys(model))
    return [{**finding, "loc": _without_tags(finding["loc"], known)} for finding in error.errors(include_url=False)]


def _without_tags(place: Sequence[str | int], known: Container[str]) -> tuple[str | int, ...]:
    """`("data", "cleaning", 0, "html", "form")` -> `("data", "cleaning", 0, "form")`: after an item's number, what is no key is a tag."""
    kept: list[str | int] = []
    for i, part in enumerate(place):
        in_item = bool(kept) and isinstance(kept[-1], int) and i + 1 < len(place)
        if not (in_item and ".".join(name for name in (*kept, part) if isinstance(name, str)) not in known):
            kept.append(part)
    return tuple(kept)


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a tree of sections, as `section.key`, sections themselves included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for below in _sections_in(field.annotation):
            yield from dotted_keys(below, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated, tuple):
        for part in get_args(annotation):
            yield from _sections_in(part)


def dotted(place: Sequence[str | int]) -> str:
    """`("data", "sources", 0, "path")` -> `data.sources[0].path`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def shown(value: Any) -> str:
    """A value as a recipe would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` for the choice nearest to `name`, or nothing."""
    nearest = difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _sentence(finding: Mapping[str, Any], known: Sequence[str]) -> str:
    kind, key, value, context = finding["type"], dotted(finding["loc"]), shown(finding["input"]), finding.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key {key}{_nearest_key(finding['loc'], known)}"
    if kind == "missing":
        return f"{key} is missing: the recipe must state it"
    if kind in _EXPECTED:
        return f"{key} is {value}, which should be {_EXPECTED[kind]}"
    if kind in _BOUNDS:
        word, bound = _BOUNDS[kind]
        return f"{key} is {value}, which should be {word} {context[bound]:.10g}"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{key} is {value}, which is none of {', '.join(choices)}{did_you_mean(str(finding['input']), choices)}"
    if kind == "union_tag_invalid":
        choices = context["expected_tags"].replace("'", "").split(", ")
        name, tag = context["discriminator"].strip("'"), context["tag"]
        return f"{key}.{name} is {shown(tag)}, which is none of {', '.join(choices)}{did_you_mean(tag, choices)}"
    if kind == "union_tag_not_found":
        return f"{key}.{context['discriminator'].strip(chr(39))} is missing: the recipe must state it"
    if kind == "too_short" and not finding["input"]:
        return f"{key} is empty: give at least {context['min_length']}"
    message = finding["msg"].replace("Tuple", "the list")
    return f"{key} is {value}: {message[0].lower()}{message[1:]}"


def _nearest_key(place: Sequence[str | int], known: Sequence[str]) -> str:
    """The likeliest key that was meant: a sibling, else the same name in another section, else what is spelt most like it."""
    path = ".".join(part for part in place if isinstance(part, str))
    section, _, name = path.rpartition(".")
    siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(name, siblings, n=1)
    if nearest:
        return f"; did you mean {section}.{nearest[0]}?".replace(" .", " ")
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    return f"; did you mean {elsewhere[0]}?" if elsewhere else did_you_mean(path, known)
