"""The shape that a structured pruning leaves: of the parent's, by sizes, by a target in parameters, or both."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from itertools import product

from largeformer.config.prune import WIDTH_AXES, PruneConfig
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.models.flops import parameter_count

Sizes = dict[str, int]
_NEARLY = 0.005  # of the parent's parameters: what balance is worth
_REACH = 0.1  # how far an axis may shrink more or less than all together


def sizes_of(model: ModelConfig) -> Sizes:
    """Everything that pruning may change, and what else changes shapes."""
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
    }


def pruned_shape(model: ModelConfig, vocab_size: int, prune: PruneConfig) -> ModelConfig:
    """`model` made smaller as `prune` says; its heads keep their size. Raises BadInputError with everything that cannot be."""
    fixed = _with_groups(model, prune.sizes)
    if wrong := list(_wrong_sizes(model, fixed)):
        raise BadInputError(wrong)
    free = [axis for axis in (prune.axes if prune.method == "width" else ("num_layers",)) if axis not in fixed]
    target = prune.target
    if target is None:
        return _shaped(model, fixed)
    if not free:
        raise BadInputError(
            "prune.target_parameters asks for a number of parameters, and the sizes leave nothing to reach it by: leave one out, or name "
            "another of prune.axes"
        )
    full = parameter_count(model, vocab_size)
    return _fitted(model, vocab_size, fixed, free, round(target * full) if target < 1 else int(target), prune.multiple_of)


def _with_groups(model: ModelConfig, given: Mapping[str, int]) -> Sizes:
    """Where each head has its own keys and values, heads are groups; where only groups are named, theirs go with them."""
    fixed = dict(given)
    if model.query_groups == model.num_attention_heads:
        for one, other in (("num_attention_heads", "num_query_groups"), ("num_query_groups", "num_attention_heads")):
            if one in fixed:
                fixed.setdefault(other, fixed[one])
    elif "num_query_groups" in fixed:
        fixed.setdefault("num_attention_heads", fixed["num_query_groups"] * (model.num_attention_heads // model.query_groups))
    return fixed


def _wrong_sizes(model: ModelConfig, fixed: Sizes) -> Iterator[str]:
    whole = sizes_of(model)
    for axis, size in fixed.items():
        if size > whole[axis]:
            yield f"prune.{axis} is {size}, and the model has {whole[axis]}: pruning makes it smaller"
    if fixed and all(size == whole[axis] for axis, size in fixed.items()):
        yield f"prune.{' and prune.'.join(fixed)} are the sizes that the model has: name smaller ones"
    heads = fixed.get("num_attention_heads", model.num_attention_heads)
    groups = fixed.get("num_query_groups", model.query_groups)
    if heads % groups:
        yield (
            f"prune.num_attention_heads {heads} leaves no equal number of heads in each of {groups} query groups: name a multiple, or "
            "prune.num_query_groups as well"
        )
    elif heads // groups > model.num_attention_heads // model.query_groups:
        yield (
            f"prune.num_query_groups {groups} leaves {heads // groups} heads in each, and there are "
            f"{model.num_attention_heads // model.query_groups}: name at most that many prune.num_attention_heads"
        )


def _shaped(model: ModelConfig, sizes: Sizes) -> ModelConfig:
    return model.model_copy(update={**sizes_of(model), **sizes})


def _steps(model: ModelConfig, axis: str, multiple: int) -> list[int]:
    """The sizes that the axis may have, from the smallest."""
    whole = sizes_of(model)[axis]
    if axis == "num_layers":
        return list(range(1, whole + 1))
    if axis == "num_attention_heads":
        return list(range(model.query_groups, whole + 1, model.query_groups)) if model.query_groups < whole else list(range(1, whole + 1))
    return sorted({*range(multiple, whole, multiple), whole})


def _fitted(model: ModelConfig, vocab_size: int, fixed: Sizes, free: list[str], target: int, multiple: int) -> ModelConfig:
    """Of the shapes with at most `target` parameters the one that has most, or has nearly as many and whose axes shrink more alike."""
    choices = {axis: _steps(model, axis, multiple) for axis in free}
    full = parameter_count(model, vocab_size)

    def made(sizes: Sizes) -> ModelConfig:
        return _shaped(model, _with_groups(model, {**fixed, **sizes}))

    def count(sizes: Sizes) -> int:
        return parameter_count(made(sizes), vocab_size)

    smallest = count({axis: sizes[0] for axis, sizes in choices.items()})
    if not smallest <= target < full:
        raise BadInputError(
            f"prune.target_parameters asks for {target:,} of {full:,} parameters; by {' and '.join(free)}, {smallest:,} to "
            f"{full - 1:,} can be had: change it, or prune.axes"
        )
    *others, last = free
    near = [_near(choices[axis], _even_share(choices, count, target)) for axis in others]
    found = []
    for sizes in product(*near):
        known = dict(zip(others, sizes, strict=True))
        fitting = bisect_right(choices[last], target, key=lambda size, known=known: count({**known, last: size}))  # type: ignore[misc]
        if fitting:
            found.append({**known, last: choices[last][fitting - 1]})
    counted = [(count(sizes), sizes) for sizes in found]
    most = max(parameters for parameters, _ in counted)
    nearly = [(parameters, sizes) for parameters, sizes in counted if parameters >= most - _NEARLY * full]
    return made(max(nearly, key=lambda one: (min(size / choices[axis][-1] for axis, size in one[1].items()), one[0]))[1])


def _even_share(choices: Mapping[str, list[int]], count: Callable[[Sizes], int], target: int) -> float:
    """The share of every axis at which the shape has `target` parameters, if sizes need be no multiples."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        fits = count({axis: max(1, int(middle * sizes[-1])) for axis, sizes in choices.items()}) <= target
        low, high = (middle, high) if fits else (low, middle)
    return low


def _near(sizes: list[int], share: float) -> list[int]:
    """The sizes about that share of the largest: the two next to it in any case, and the smallest, which fits if any does."""
    above = bisect_right(sizes, share * sizes[-1])
    next_to_it = sizes[max(0, above - 1) : above + 1]
    return [size for size in sizes if size in (sizes[0], *next_to_it) or abs(size / sizes[-1] - share) <= _REACH]


def narrowed(before: ModelConfig, after: ModelConfig) -> dict[str, tuple[int, int]]:
    """The axes that differ: from, to."""
    old, new = sizes_of(before), sizes_of(after)
    return {axis: (old[axis], new[axis]) for axis in ("num_layers", *WIDTH_AXES) if old[axis] != new[axis]}
