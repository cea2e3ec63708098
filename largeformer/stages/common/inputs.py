"""What a stage that works on an earlier one's model starts from, and whose its folder is.

folder/origin.json    what makes the result what it is: the stage's settings, the checkpoint, and the identities of the parents
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact, file_sha256, identity_hash, write_atomically
from largeformer.checkpoint.manifest import checksum
from largeformer.config.chain import StageEntry, TrainedSection, at_stage
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data
from largeformer.stages.common.claim import CONFIG, belongs_to_another, forget_rewinds, holds_results, set_aside
from largeformer.stages.common.weights import Source, find_source, shaped_like

ORIGIN, SOURCE = "origin.json", "source.json"
_MODELS = ("import", "pretrain", "prune", "distill", "quantize")


@dataclass(frozen=True)
class Input:
    """A stage of the chain, ready to begin. recipe: as the stage reads it, with the model, tokenizer and data of the checkpoint.
    made_by: the artifact that the checkpoint belongs to, None where its stage has not finished. folder: the stage's own. text: what an
    identity calls the prepared data."""

    recipe: Recipe
    entry: StageEntry
    source: Source
    made_by: Artifact | None
    folder: Path
    text: str

    @property
    def parents(self) -> dict[str, Artifact]:
        """By the names that the manifest gives them."""
        return {artifact.kind: artifact for artifact in (self.source.prepared, self.made_by) if artifact is not None}

    def origin(self, **further: Artifact) -> dict[str, Any]:
        """What makes the result what it is. `further`: other artifacts that it is made from, such as a teacher."""
        parents = {name: artifact.identity for name, artifact in (self.parents | further).items()}
        checkpoint = weights_named(self.source.checkpoint, self.made_by)
        return {
            **self.recipe.identity(self.entry.stage),
            "checkpoint": checkpoint,
            "parents": parents,
            "text": self.text,
            **self._calibrated_on(),
        }

    def _calibrated_on(self) -> dict[str, str | None]:
        """The content of the text that `calibration.text` names."""
        section = getattr(self.recipe, self.entry.stage, None)
        settings = getattr(section, "calibration", None)
        return {} if settings is None or settings.text is None else {"calibration_text": content_named(Path(settings.text))}


def weights_named(checkpoint: Path, made_by: Artifact | None) -> str:
    """What an identity calls the weights of a checkpoint: by its name, beside the identity of its stage; where that has not finished
    (`made_by` None) nobody has said yet what they are, and their checksums do. Raises OSError where it cannot be read."""
    return checkpoint.name if made_by is not None else f"{checkpoint.name} {checksum(checkpoint)}"


def content_named(text: Path) -> str | None:
    """What an identity calls a file of text, or a prepare folder; None where there is neither, which is refused where it is read."""
    if (prepared := Artifact.read(text)) is not None:
        return prepared_data.content(prepared)
    try:
        return file_sha256(text)
    except OSError:
        return None


def input_of(recipe: Recipe, entry: StageEntry, source: Path | None) -> Input:
    """What `entry` of the recipe's chain works on: the checkpoint at `source` (a run, a stage or a checkpoint), by default that of the
    stage before it. Collective. Raises BadInputError where there is none, or that stage has not finished."""
    from largeformer.parallel.agreement import from_main

    found = find_source(recipe, source or from_main(lambda: stage_before(recipe, entry)))
    made_by = Artifact.read(found.checkpoint.parent.parent)
    folder = Path(recipe.run.output_dir) / entry.name
    as_set = at_stage(recipe, entry)
    section = getattr(as_set, entry.stage, None)
    trains = isinstance(section, TrainedSection) and section.trains
    text = from_main(lambda: prepared_data.content(found.prepared))
    return Input(shaped_like(as_set, found, trains=trains), entry, found, made_by, folder, text)


def stage_before(recipe: Recipe, entry: StageEntry | None) -> Path:
    """The folder of the nearest stage before `entry` in the recipe's own run that has left a model; of None, and of one that does not stand
    in `run.stages`, the last of all. Raises BadInputError where that stage has not finished, or its checkpoints are gone."""
    run, names = Path(recipe.run.output_dir), [other.name for other in recipe.run.stages]
    earlier = names[: names.index(entry.name)] if entry is not None and entry.name in names else names
    kinds = {other.name: other.stage for other in recipe.run.stages} | {"import": "import"}
    made = {run / name: Artifact.read(run / name) for name in ("import", *earlier) if kinds[name] in _MODELS}
    models = [folder for folder, artifact in made.items() if (folder / "checkpoints").is_dir() or artifact is not None]
    if models and not (models[-1] / "checkpoints").is_dir():
        raise BadInputError(f"{models[-1]} has finished, and its checkpoints are gone: restore them, or run {models[-1].name} again")
    if models and made[models[-1]] is None:
        raise BadInputError(
            f"{models[-1]} has left checkpoints but has not finished: it was interrupted, or is beyond its quality.limits. Run "
            f"{models[-1].name} to its end, or work on it as it is with --from {models[-1]}"
        )
    return models[-1] if models else run


def finished(given: Input, origin: Mapping[str, Any], *, fresh: bool) -> Artifact | None:
    """The artifact in the stage's folder, where it is this origin's and its checkpoint is whole. Touches nothing. On rank 0 only.

    Raises BadInputError where the folder holds results of another origin, unless `fresh` allows to set them aside.
    """
    done = Artifact.read(given.folder)
    if done is not None and done.identity == identity_hash(origin) and not _damaged(given.folder):
        return done
    held = _origin_in(given.folder)
    if held not in (None, dict(origin)) and not fresh:
        raise belongs_to_another(given.folder, held or {}, origin)
    return None


def take(given: Input, origin: Mapping[str, Any]) -> None:
    """Make the stage's folder this origin's: what has not finished of it stays, other results are set aside. On rank 0 only, and only once
    nothing can be refused any more."""
    folder, held = given.folder, _origin_in(given.folder)
    if held is not None and (held != dict(origin) or Artifact.read(folder) is not None):
        if held == dict(origin):
            print(f"the checkpoint in {folder} is damaged: the folder is set aside, and made anew", flush=True)
        set_aside(folder)
    if _written(folder) != dict(origin):
        forget_rewinds(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ORIGIN, (json.dumps(origin, indent=2) + "\n").encode())
    write_atomically(folder / CONFIG, recipe_yaml(given.recipe).encode())
    return None


def record(given: Input, made: Artifact) -> None:
    """Tell W&B, where the recipe wants it, what the stage has made of its parents. On rank 0 only."""
    from largeformer.tracking.build import record_artifact
    from largeformer.tracking.provenance import git_state

    told = {"recipe": given.recipe.model_dump(mode="json"), "git": git_state(Path.cwd()), "versions": made.versions}
    record_artifact(given.recipe.tracking, given.recipe.run.name, told, made, list(given.parents.values()))


def _damaged(folder: Path) -> bool:
    """Whether a finished stage's checkpoint is not what was written, as far as sizes tell; its hashes are looked at where it is read."""
    from largeformer.checkpoint.commit import newest
    from largeformer.checkpoint.verify import quick_problems

    checkpoint = newest(folder / "checkpoints")
    return checkpoint is None or bool(quick_problems(checkpoint))


def _origin_in(folder: Path) -> dict[str, Any] | None:
    """Whose the results in `folder` are: empty where it cannot be told, None where there are none."""
    return _written(folder) if holds_results(folder) else None


def _written(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / ORIGIN).read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}
