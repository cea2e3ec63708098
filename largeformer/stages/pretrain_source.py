"""What a `pretrain` with `checkpoint.load` goes on from, and what it keeps of that once it has checkpoints of its own.

folder/source.json    the checkpoint, its stage and identity, where it stood, and its zeros that are a mask: a run goes on without it
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact, file_sha256, write_atomically
from largeformer.checkpoint.manifest import MANIFEST
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError, StageFailed
from largeformer.stages.common.claim import holds_results, identity_in, set_aside
from largeformer.stages.common.inputs import SOURCE
from largeformer.stages.common.prepared_data import another_tokenizer
from largeformer.stages.common.sparse import is_sparse, sparsity_trained
from largeformer.stages.common.training import TrainingJob
from largeformer.stages.common.weights import reads_by
from largeformer.stages.common.world import World


@dataclass(frozen=True)
class _Origin:
    """`digest`: of the checkpoint's list of files. `step`, `samples`: what had been trained and read there. `zeros`: the share of the
    weights of linear layers that is 0, where the zeros are a mask. `kind`, `identity`: of the stage that saved it, once it has finished."""

    checkpoint: str
    digest: str
    step: int
    samples: int
    zeros: float | None
    kind: str | None = None
    identity: str | None = None

    @property
    def parents(self) -> dict[str, Artifact]:
        folder = Path(self.checkpoint).absolute().parent.parent
        return {} if self.kind is None or self.identity is None else {self.kind: Artifact(self.kind, folder, self.identity)}

    @property
    def stands(self) -> bool:
        """Whether the checkpoint is where it was, whole. On one process."""
        from largeformer.checkpoint.verify import quick_problems

        start = Path(self.checkpoint)
        return not quick_problems(start) and file_sha256(start / MANIFEST) == self.digest


def check_source(recipe: Recipe, folder: Path, fresh: bool) -> None:
    """Raise BadInputError where the training in `folder` went on from what stood at `checkpoint.load` before another took its place; with
    `fresh` the folder is set aside instead. Where nobody can tell, or the source is gone, it is needed no more. On rank 0 only."""
    load = recipe.checkpoint.load
    if load is None or not holds_results(folder) or identity_in(folder, "pretrain") != recipe.identity("pretrain"):
        return
    held, now = _parents_in(folder), _made_by(Path(load))
    if now is None or held.get(now.kind, now.identity) == now.identity:
        return
    if not fresh:
        raise BadInputError(
            f"{folder} went on from another {now.kind} ({held[now.kind]}) than stands in {now.path} now ({now.identity}): choose "
            "another run.output_dir, or pass --fresh to set the old folder aside"
        )
    set_aside(folder)


def continued(recipe: Recipe, world: World, job: TrainingJob) -> tuple[TrainingJob, _Origin]:
    """The job as it goes on from `checkpoint.load`, or with what it has saved since; zeros of a pruned model stay. Collective. Raises
    BadInputError where there is no checkpoint, one that reads by another tokenizer, or nothing left to train."""
    from largeformer.checkpoint.commit import committed

    own = job.folder / "checkpoints"

    def begun() -> _Origin | None:
        ours = identity_in(job.folder, "pretrain") == recipe.identity("pretrain") and committed(own)
        return _read(job.folder) if ours else None

    there = world.from_main(begun)
    job, origin = _begun_from(recipe, world, job) if there is None else (job, there)
    job = replace(job, parents=origin.parents, behind=(origin.step, origin.samples))
    if origin.zeros is None:
        return job, origin
    stands = world.from_main(lambda: origin.stands)
    return (_holding(world, job, Path(origin.checkpoint)) if stands else _holding_its_own(world, job, origin.zeros)), origin


def note(folder: Path, origin: _Origin) -> None:
    """For `continued`, once the folder is this training's. On rank 0 only."""
    write_atomically(folder / SOURCE, (json.dumps(asdict(origin), indent=2) + "\n").encode())


def _begun_from(recipe: Recipe, world: World, job: TrainingJob) -> tuple[TrainingJob, _Origin]:
    from largeformer.checkpoint.verify import find
    from largeformer.training.checkpointing import read_state

    found = find(Path(recipe.checkpoint.load or ""), recipe.checkpoint.verify == "sha256")
    start = found.checkpoint
    state, made_by = world.from_main(lambda: (read_state(start), Artifact.read(start.parent.parent)))
    told = state["extra"].get("text") or world.from_main(lambda: reads_by(start))
    if other := another_tokenizer(told, job.prepared):
        raise BadInputError(f"checkpoint.load {start} reads by {other}: prepare the text with the model's own (tokenizer.model)")
    step, samples = state["progress"]["step"], state["progress"]["samples"]
    if step >= recipe.train.train_iters:
        raise BadInputError(
            f"checkpoint.load {start} is of step {step}, and train.train_iters is {recipe.train.train_iters}, which counts from 0: set it "
            "to more"
        )
    digest, zeros = world.from_main(lambda: (file_sha256(start / MANIFEST), _masked(start)))
    made = () if made_by is None else (made_by.kind, made_by.identity)
    origin = _Origin(str(start), digest, step, samples, zeros, *made)
    return replace(job, continues=found), origin


def _holding(world: World, job: TrainingJob, start: Path) -> TrainingJob:
    from largeformer.training.masks import hold_zeros

    return replace(
        job,
        alter=lambda chunks, shards: hold_zeros(start, shards),
        measure=lambda training: sparsity_trained(world, start, job.folder),
    )


def _holding_its_own(world: World, job: TrainingJob, zeros: float) -> TrainingJob:
    """The model that had the mask is gone: the zeros are those of the training's newest checkpoint, no fewer than the share `zeros`."""
    from largeformer.checkpoint.commit import newest
    from largeformer.training.masks import hold_zeros

    def last() -> Path:
        found = world.from_main(lambda: newest(job.folder / "checkpoints"))
        assert found is not None, "it goes on from its own"
        return found

    def measure(training: Any) -> dict[str, Any]:
        found = sparsity_trained(world, last(), job.folder)
        if found.get("sparsity", {}).get("overall", 0.0) < zeros:
            raise StageFailed([f"{last()} has lost zeros of the model that it was made from"])
        return found

    return replace(job, alter=lambda chunks, shards: hold_zeros(last(), shards), measure=measure)


def _masked(checkpoint: Path) -> float | None:
    """The share of zeros over all linear layers, where they are a mask and there are any."""
    from largeformer.compression.pruning.sparsity import sparsity_metrics
    from largeformer.export.streaming import StoredTensors

    return sparsity_metrics(StoredTensors.of_checkpoint(checkpoint))["overall"] or None if is_sparse(checkpoint) else None


def _parents_in(folder: Path) -> Mapping[str, str]:
    """What the training in `folder` went on from: identities by kind, empty where nobody can tell."""
    if (there := Artifact.read(folder)) is not None:
        return there.parents
    origin = _read(folder)
    return {} if origin is None else {kind: artifact.identity for kind, artifact in origin.parents.items()}


def _made_by(load: Path) -> Artifact | None:
    """The finished stage whose checkpoint `load` names; None where nobody can tell, or it is gone."""
    from largeformer.checkpoint.commit import candidates

    try:
        return Artifact.read(candidates(load)[0].parent.parent)
    except BadInputError:
        return None


def _read(folder: Path) -> _Origin | None:
    try:
        return _Origin(**json.loads((folder / SOURCE).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
