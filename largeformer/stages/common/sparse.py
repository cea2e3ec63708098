"""What a stage owes to the zeros of the model that it began with, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from largeformer.compression.pruning.sparsity import StoredWeights


def sparsity_kept(parent: Path, child: Path, named: Callable[[str], str] = str) -> dict[str, Any]:
    """For the manifest of a stage that made the checkpoint `child` from `parent`: the key "sparsity", as `prune` wrote it; nothing where
    the parent has no zeros. `named`: what a weight of the child, of the same shape, is called in the parent. On one process. Raises
    StageFailed where the child has lost some of them."""
    from largeformer.compression.pruning.sparsity import assert_zeros_kept, count_zeros, sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    after = StoredTensors.of_checkpoint(child)
    before = _Renamed(StoredTensors.of_checkpoint(parent), after.names, named)
    if not any(count.zeros for count in count_zeros(before).values()):
        return {}
    assert_zeros_kept(before, after)
    return {"sparsity": sparsity_metrics(after)}


@dataclass(frozen=True)
class _Renamed:
    """The parent's weights by the child's names."""

    stored: StoredWeights
    names: Sequence[str]
    named: Callable[[str], str]

    def dtype(self, name: str) -> torch.dtype:
        return self.stored.dtype(self.named(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.shape(self.named(name))

    def read(self, name: str) -> torch.Tensor:
        return self.stored.read(self.named(name))
