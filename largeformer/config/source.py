"""From a YAML file and `section.key=value` overrides to one raw mapping. What the values mean is not decided here."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from largeformer.errors import BadInputError


class _Loader(yaml.SafeLoader):
    """Safe YAML, with two traps of YAML 1.1 removed: a key given twice is noted, and `1e-3` is a number."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                self.duplicates.append(f"key {key.value} stands twice, in lines {seen[key.value]} and {line}: keep one")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that `_Loader` would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
    )


def read_yaml(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping in `path`, and the problems that leave it readable. Raises BadInputError, with the line, where it is not."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"recipe {path} cannot be read: {error}") from error
    try:
        raw, problems = _parse(text)
    except yaml.YAMLError as error:
        raise BadInputError(f"recipe {path}{_place(error)} is not valid YAML: {_reason(error)}") from error
    if not isinstance(raw, dict):
        raise BadInputError(f"recipe {path} holds {_kind(raw)}, not sections: it starts with lines such as 'model:'")
    return raw, [f"recipe {path}: {problem}" for problem in problems]


def to_yaml(tree: dict[str, Any]) -> str:
    """`tree` as YAML that `read_yaml` reads back to the same values, keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """`raw` with each `section.key=value` set (the value is read as YAML), and what is wrong with the overrides themselves."""
    problems = []
    for override in overrides:
        dotted, separator, text = override.partition("=")
        keys = dotted.strip().split(".")
        if not separator or not all(keys):
            problems.append(f"override '{override}' is not of the form section.key=value, for example train.train_iters=20")
            continue
        try:
            value, duplicates = _parse(text)
        except yaml.YAMLError as error:
            problems.append(f"override '{override}': the value is not valid YAML: {_reason(error)}")
            continue
        problems += [f"override '{override}': {problem}" for problem in duplicates]
        try:
            raw = _replaced(raw, keys, value)
        except TypeError as error:
            problems.append(f"override '{override}' reaches into {error}, which is not a section: set it whole")
    return raw, problems


def _parse(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML text, as JSON knows values (dates are text, keys are text), and keys that stand twice."""
    loader = _Loader(text)
    try:
        return json.loads(json.dumps(loader.get_single_data(), default=str)), loader.duplicates
    except (RecursionError, ValueError, TypeError) as error:
        raise yaml.YAMLError(f"it cannot be held as plain values: {error}") from error
    finally:
        loader.dispose()


def _replaced(tree: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with the value at `keys` set; sections on the way are made. Raises TypeError naming a key that is no section."""
    head, *rest = keys
    if not rest:
        return {**tree, head: value}
    below = tree.get(head)
    if not isinstance(below, dict | None):
        raise TypeError(head)
    return {**tree, head: _replaced(below or {}, rest, value)}


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1} column {mark.column + 1}," if mark is not None else ""


def _reason(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).replace("\n", " ")


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
