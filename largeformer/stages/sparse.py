"""What a stage owes to the zeros of the model that it began with, and what its manifest says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def sparsity_kept(parent: Path, child: Path) -> dict[str, Any]:
    """For the manifest of a stage that made the checkpoint `child` from `parent`, of the same shape: the key "sparsity", as `prune` wrote
    it; nothing where the parent has no zeros. On one process. Raises StageFailed where the child has lost some of them."""
    from largeformer.compression.sparsity import assert_zeros_kept, count_zeros, sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    before, after = (StoredTensors.of_checkpoint(checkpoint) for checkpoint in (parent, child))
    if not any(count.zeros for count in count_zeros(before).values()):
        return {}
    assert_zeros_kept(before, after)
    return {"sparsity": sparsity_metrics(after)}
