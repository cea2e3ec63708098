"""Sums over tokens that come about in a forward pass, over the micro batches of one step, for the step's row of metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist

from largeformer.parallel.groups import ParallelGroups

_TOKENS = "tokens"


class Figures:
    """names: all that there may be, the same on every rank. A figure is added up where it is known: on one pipeline stage, or on each its
    own part; on each tensor-parallel rank the whole, unless `parts` names it: then its part."""

    def __init__(self, names: tuple[str, ...], groups: ParallelGroups, parts: tuple[str, ...] = ()) -> None:
        self._names, self._groups, self._parts = (*names, _TOKENS), groups, parts
        self._sums: dict[str, torch.Tensor] = {}

    def begin(self) -> None:
        """Forget the step before."""
        self._sums = {}

    def add(self, **values: torch.Tensor) -> None:
        """Sums over tokens, and of `tokens` themselves, how many count: on the last pipeline stage alone."""
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, float]:
        """By name, over the tokens of the whole global batch; alike on every rank. Empty before the first step. Collective."""
        nothing = torch.zeros((), dtype=torch.float64)
        first, sums_here = self._groups.coordinates.tensor == 0, self._sums
        mine = [sums_here.get(name, nothing) if first or name in self._parts else nothing for name in self._names]
        held = torch.stack([value.to(self._groups.device) for value in mine])
        dist.all_reduce(held)
        *sums, tokens = held.tolist()
        return {name: value / tokens for name, value in zip(self._names[:-1], sums, strict=True)} if tokens else {}
