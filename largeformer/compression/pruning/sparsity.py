"""Zeros in a model's linear layers: how many, in which pattern, and whether a later stage has kept them.

A pruned weight is exactly 0, and the zero pattern is the mask: there is no other. Whole tensors come one at a time, by their global names.
Linear layers are those of the Transformer layers: embeddings and the head are never pruned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from largeformer.errors import StageFailed

_LINEAR = re.compile(r"decoder\.layers\.\d+\.(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])\.weight(_[wv])?")
_SHOWN = 3
_MATRICES = 3


class Readable(Protocol):
    """Global tensors by name, each read whole when it is asked for."""

    @property
    def names(self) -> Sequence[str]: ...

    def read(self, name: str) -> torch.Tensor: ...


class StoredWeights(Readable, Protocol):
    """Such as `export.streaming.StoredTensors`."""

    def dtype(self, name: str) -> torch.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...


class View:
    """Tensors that are made of others when they are asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], torch.Tensor]) -> None:
        self.names, self.read = names, read


@dataclass(frozen=True)
class Count:
    """Of the weights of linear layers, those that are 0."""

    zeros: int
    weights: int

    @property
    def share(self) -> float:
        return self.zeros / max(1, self.weights)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Count:
        return cls(int((weight == 0).sum()), weight.numel())

    def __add__(self, other: Count) -> Count:
        return Count(self.zeros + other.zeros, self.weights + other.weights)


def linear_weights(stored: Readable) -> list[str]:
    """The names of the linear layers' weights."""
    return [name for name in stored.names if _LINEAR.fullmatch(name)]


def has_zeros(stored: Readable) -> bool:
    """Whether a weight of a linear layer is 0."""
    return any(bool((stored.read(name) == 0).any()) for name in linear_weights(stored))


def count_zeros(stored: Readable) -> dict[str, Count]:
    """By weight."""
    return {name: Count.of(stored.read(name)) for name in linear_weights(stored)}


def sparsity_metrics(stored: Readable, pattern: tuple[int, int] | None = None) -> dict[str, Any]:
    """What a manifest says under "sparsity": the share of zeros over all linear layers, over each kind of them (least and most of the
    layers), the counts, and the pattern that the stage asked for, with whether every weight has it."""
    counts: dict[str, Count] = {}
    holds = True
    for name in linear_weights(stored):
        weight = stored.read(name)
        counts[name] = Count.of(weight)
        holds = holds and (pattern is None or has_pattern(weight, *pattern))
    total = sum(counts.values(), Count(0, 0))
    kinds: dict[str, list[float]] = {}
    for name, count in counts.items():
        kinds.setdefault(name.split(".", 3)[3], []).append(count.share)
    about = {} if pattern is None else {"pattern": "{}:{}".format(*pattern), "pattern_holds": holds}
    by_kind = {kind: {"least": min(shares), "most": max(shares)} for kind, shares in sorted(kinds.items())}
    return {"overall": total.share, **asdict(total), "by_kind": by_kind, **about}


def has_pattern(weight: torch.Tensor, kept: int, of: int) -> bool:
    """Whether at most `kept` of each `of` weights that follow each other in a row [o, i] are not 0; false where `of` does not divide i."""
    if weight.shape[1] % of:
        return False
    return bool(((weight != 0).unflatten(1, (-1, of)).sum(-1) <= kept).all())


def zeros_lost(parent: Readable, child: Readable) -> Iterator[tuple[str, int]]:
    """The weights of `child` in which something is not 0 any more that is 0 in `parent`, and how many. Both have the same shapes."""
    for name in linear_weights(parent):
        lost = int(((parent.read(name) == 0) & (child.read(name) != 0)).sum())
        if lost:
            yield name, lost


def assert_zeros_kept(parent: Readable, child: Readable) -> Count:
    """Every zero of the parent's linear layers is one in the child's. Returns the child's count. Raises StageFailed where not: no stage
    may hand on what it has not kept sparse."""
    refuse_lost(dict(zeros_lost(parent, child)))
    return sum(count_zeros(child).values(), Count(0, 0))


def refuse_lost(lost: Mapping[str, int]) -> None:
    """Raises StageFailed where a weight has lost zeros: `lost` says how many, by name."""
    if lost:
        problem = (
            f"{sum(lost.values()):,} pruned weights are not 0 any more, in {_named(list(lost))}: "
            "the stage must hold its parent's zeros and its own, and what it has written is not to be used"
        )
        raise StageFailed([problem])


def assert_share(stored: Readable, share: float, *, together: bool) -> None:
    """The share `share` of each linear layer's weights is 0, or of all of them `together`. A layer has up to three matrices of its own, in
    each of which part of a weight may be missing to it. Raises StageFailed where it is not."""
    counts = count_zeros(stored)
    held = {"all linear layers": sum(counts.values(), Count(0, 0))} if together else counts
    short = [name for name, count in held.items() if count.zeros < int(share * count.weights) - _MATRICES]
    if short:
        least = min(held[name].share for name in short)
        problem = (
            f"in {_named(short)} only {least:.4f} of the weights are 0, fewer than the {share} that were asked for: "
            "what the stage has written is not to be used"
        )
        raise StageFailed([problem])


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} others" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
