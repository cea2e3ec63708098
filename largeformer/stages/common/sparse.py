"""What a stage owes to the zeros of the model that it began with, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact
from largeformer.stages.common.inputs import ORIGIN, SOURCE

if TYPE_CHECKING:
    from largeformer.compression.pruning.sparsity import Readable
    from largeformer.export.streaming import StoredTensors
    from largeformer.stages.common.world import World


def sparsity_kept(
    parent: Path, child: Path, named: Callable[[str], str] = str, deployed: Callable[[StoredTensors], Readable] | None = None
) -> dict[str, Any]:
    """For the manifest of a stage that made the checkpoint `child` from `parent`: the key "sparsity", as `prune` wrote it; nothing where
    the parent has no zeros. `named`: what a weight of the child, of the same shape, is called in the parent. `deployed`: the weights of the
    child as they will compute, which must hold them too, and are those that the manifest speaks of. On one process. Raises StageFailed
    where the child has lost some of them."""
    from largeformer.compression.pruning.sparsity import View, assert_zeros_kept, has_zeros, sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    stored, after = StoredTensors.of_checkpoint(parent), StoredTensors.of_checkpoint(child)
    before = View(after.names, lambda name: stored.read(named(name)))
    if not has_zeros(before):
        return {}
    assert_zeros_kept(before, after)
    if deployed is None:
        return {"sparsity": sparsity_metrics(after)}
    computed = deployed(after)
    assert_zeros_kept(before, computed)
    return {"sparsity": sparsity_metrics(computed)}


def sparsity_trained(world: World, start: Path, folder: Path, named: Callable[[str], str] = str) -> dict[str, Any]:
    """The same of the stage in `folder`, which has trained the model of the checkpoint `start`. Collective."""
    from largeformer.checkpoint.commit import newest

    def kept() -> dict[str, Any]:
        last = newest(folder / "checkpoints")
        assert last is not None, "training has saved its last step"
        return sparsity_kept(start, last, named)

    return world.from_main(kept)


def is_sparse(checkpoint: Path) -> bool:
    """Whether the zeros of a checkpoint are a mask, by what its stage says; one that began with a model and has not finished says nothing,
    and so they may be."""
    folder = checkpoint.absolute().parent.parent
    made_by = Artifact.read(folder)
    if made_by is not None:
        return "sparsity" in made_by.metrics
    return any((folder / name).exists() for name in (ORIGIN, SOURCE))
