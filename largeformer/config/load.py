"""From a recipe file and overrides to a checked `Recipe`. All problems are collected first, then raised once.

Types and rules are judged together: a value that cannot be read is replaced by a stand-in, the rules run on the whole
tree, and sentences that name a stand-in are dropped. So a slip in one key never hides a problem in another.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from largeformer.config.checks import recipe_problems, stage_problems
from largeformer.config.deepspeed import check_world, deepspeed_problems, load_deepspeed
from largeformer.config.resources import find_deepspeed, find_recipe
from largeformer.config.schema import Recipe
from largeformer.config.section import Section
from largeformer.config.sentences import findings_of, sentences, shown
from largeformer.config.source import apply_overrides, read_yaml, to_yaml
from largeformer.errors import BadInputError

__all__ = ["check_world", "load_recipe", "recipe_yaml"]

_FP8 = "8-bit floats are not supported yet: use train.precision bf16"
_MOE = "mixture of experts is not supported yet: remove it"
_NORM = "Megatron-core recomputes norms with Transformer Engine only: use core_attn or mlp"

# Keys of Megatron-core that this recipe does not have yet: key -> (values that ask for nothing, why it is refused).
_REFUSED_KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "parallel.context_parallel_size": ((None, 1), "Megatron-core has context parallelism with Transformer Engine only: remove it"),
    "parallel.expert_model_parallel_size": ((None, 1), _MOE),
    "parallel.expert_tensor_parallel_size": ((None, 1), _MOE),
    "model.num_moe_experts": ((None, 0), _MOE),
    "train.fp8": ((None, False), _FP8),
}


def load_recipe(path_or_name: str, overrides: Sequence[str] = (), *, with_deepspeed: bool = True) -> Recipe:
    """The recipe at a path, or a shipped one by name, with `section.key=value` overrides applied.

    A DeepSpeed config that is found beside the recipe, not from here, is named by its full path in the result.
    `with_deepspeed` False leaves that config unread, for stages that train nothing. Raises BadInputError with every problem.
    """
    path = find_recipe(path_or_name)
    raw, problems = read_yaml(path)
    raw, wrong = apply_overrides(raw, overrides)
    raw, refused, unusable = _without_refused(raw)
    recipe, misread, stand_ins = _validated(raw)
    stand_ins |= unusable
    problems += wrong + refused + misread
    if recipe is not None:
        ruled = [*recipe_problems(recipe), *stage_problems(recipe)]
        if with_deepspeed:
            recipe, found = _with_deepspeed(recipe, path.parent)
            ruled += found
        problems += [sentence for sentence in ruled if not _names(sentence, stand_ins)]
    if problems:
        raise BadInputError(list(dict.fromkeys(problems)))
    assert recipe is not None
    return recipe


def recipe_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that reads back to the same recipe."""
    return to_yaml(recipe.model_dump(mode="json"))


def _with_deepspeed(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe with its DeepSpeed config found, and what is wrong with that config beside it."""
    try:
        path = find_deepspeed(recipe.deepspeed, beside=folder)
        if path == folder / recipe.deepspeed:
            recipe = recipe.model_copy(update={"deepspeed": str(path)})
        return recipe, deepspeed_problems(recipe, load_deepspeed(recipe))
    except BadInputError as error:
        return recipe, error.problems


def _without_refused(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], set[str]]:
    """`raw` without what is refused by name, a sentence for each such value that asks for something, and the names of
    known keys whose value went with it."""
    problems, unusable = [], set()
    cleaned = {name: dict(section) if isinstance(section, dict) else section for name, section in raw.items()}
    for key, (idle, reason) in _REFUSED_KEYS.items():
        section, name = key.split(".")
        if isinstance(cleaned.get(section), dict) and name in cleaned[section]:
            value = cleaned[section].pop(name)
            if not any(value == other and type(value) is type(other) for other in idle):
                problems.append(f"{key} is {shown(value)}, which is refused: {reason}")
    train = cleaned.get("train")
    if isinstance(train, dict):
        if "fp8" in str(train.get("precision")):
            problems.append(f"train.precision is {shown(train.pop('precision'))}, which is refused: {_FP8}")
            unusable.add("precision")
        modules = train.get("recompute_modules")
        if isinstance(modules, list) and "layernorm" in modules:
            problems.append(f"train.recompute_modules is {shown(modules)}; layernorm is refused: {_NORM}")
            train["recompute_modules"] = [module for module in modules if module != "layernorm"]
            unusable.add("recompute_modules")
    return cleaned, problems, unusable


def _validated(raw: dict[str, Any]) -> tuple[Recipe | None, list[str], set[str]]:
    """Validate; where that fails, drop what was wrong and try again with stand-ins.

    Returns the recipe, the sentences of the first attempt, and the names of the keys whose value is a stand-in. The
    recipe is None only where even the stand-ins do not hold.
    """
    problems: list[str] = []
    stand_ins: set[str] = set()
    for _ in range(3):
        try:
            # JSON mode is strict about types, yet takes a list for a tuple and a mapping for a section.
            recipe = Recipe.model_validate_json(json.dumps(raw), strict=True)
            return recipe, problems, stand_ins | _derived(recipe, stand_ins)
        except ValidationError as error:
            problems = problems or sentences(error, Recipe)
            raw = _repaired(raw, error, stand_ins)
    return None, problems, stand_ins


def _repaired(raw: Mapping[str, Any], error: ValidationError, stand_ins: set[str]) -> dict[str, Any]:
    """`raw` without its wrong values; required keys, all of them positive numbers, get 1. Their names go to `stand_ins`."""
    repaired: dict[str, Any] = copy.deepcopy(dict(raw))
    findings = findings_of(error, Recipe)
    unknown = [finding["loc"] for finding in findings if finding["type"] == "extra_forbidden"]
    for place in unknown:
        _drop(repaired, place)
    for finding in findings:
        top, *below = finding["loc"]
        fields = _fields(str(top))
        if finding["loc"] in unknown:
            continue
        if below and isinstance(repaired.get(str(top)), dict):
            name = str(below[0])
            stand_ins.add(name)
            repaired[str(top)].pop(name, None)
            if fields[name].is_required():
                repaired[str(top)][name] = 1
        elif top in repaired or finding["type"] == "missing":
            stand_ins.update(fields or [str(top)])
            repaired[str(top)] = {name: 1 for name, field in fields.items() if field.is_required()}
            if not fields:
                del repaired[str(top)]
    return repaired


def _drop(tree: Any, place: Sequence[str | int]) -> None:
    for part in place[:-1]:
        tree = tree[part]
    del tree[place[-1]]


def _fields(section: str) -> Mapping[str, FieldInfo]:
    """The keys of a section; none where the name is a plain key, or unknown."""
    field = Recipe.model_fields.get(section)
    kind = field.annotation if field else None
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, Section) else {}


def _derived(recipe: Recipe, stand_ins: set[str]) -> set[str]:
    """Keys that were not given and follow from a stand-in."""
    model = recipe.model
    derived = set()
    if "hidden_size" in stand_ins and model.ffn_hidden_size is None:
        derived.add("ffn_hidden_size")
    if "num_attention_heads" in stand_ins and model.num_query_groups is None:
        derived.add("num_query_groups")
    return derived


def _names(sentence: str, keys: set[str]) -> bool:
    return any(re.search(rf"\b{re.escape(key)}\b", sentence) for key in keys)
