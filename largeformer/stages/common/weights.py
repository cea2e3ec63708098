"""A trained model for evaluation and generation, at whatever layout this world has."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from largeformer.artifact import Artifact
from largeformer.config.checks import recipe_problems
from largeformer.config.data import READING
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.stages.common.world import World

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the prepared data that goes with it: of its own run, else of the run at hand; an import's own artifact where there
    is neither."""

    checkpoint: Path
    prepared: Artifact


def find_source(recipe: Recipe, source: Path | None) -> Source:
    """What `source` (a run, a stage or a checkpoint; default: the recipe's own run) means: of several checkpoints the newest whose weights
    are what was written. Collective. Raises BadInputError where there is none, its run holds no prepared data, or another tokenizer cut
    that."""
    from largeformer.checkpoint.verify import find
    from largeformer.parallel.agreement import from_main, is_main

    found = find(_trained(source or Path(recipe.run.output_dir)), recipe.checkpoint.verify == "sha256", below="weights/")
    for refused in found.refused if is_main() else ():
        _log.warning("%s; using %s instead", refused, found.checkpoint.name)
    return from_main(lambda: _with_data(recipe, found.checkpoint))


def named_model(recipe: Recipe, name: str) -> Path:
    """What a recipe means that names a model: a stage of its own run that has left checkpoints, else a path."""
    stage = Path(recipe.run.output_dir) / name
    return stage if (stage / "checkpoints").is_dir() else Path(name)


def _trained(source: Path) -> Path:
    """The stage that a run folder's weights come from: what was trained, else what was imported."""
    stages = [source / name for name in ("pretrain", "import") if (source / name / "checkpoints").is_dir()]
    return stages[0] if stages else source


def _with_data(recipe: Recipe, checkpoint: Path) -> Source:
    stage = checkpoint.absolute().parent.parent
    own, others = Artifact.read(stage.parent / prepared_data.KIND), Artifact.read(prepared_data.stage_folder(recipe))
    prepared = own or others or _imported(stage)
    if prepared is None:
        raise BadInputError(
            f"{checkpoint} lies in no run with a {prepared_data.KIND} folder, which holds the tokenizer: copy the whole run folder"
        )
    told = reads_by(checkpoint)
    if other := prepared_data.another_tokenizer(told, prepared):
        raise BadInputError(f"{checkpoint} reads by {other}: prepare the text with the model's own (tokenizer.model)")
    if not told and prepared is others:
        _log.warning("%s does not say by which tokenizer it reads: taken to be that of %s", checkpoint, prepared.path)
    return Source(checkpoint, prepared)


def reads_by(checkpoint: Path) -> dict[str, Any]:
    """`prepared_data.tokenizer_of` the text that a model was trained on; empty where nobody says. Its stage is asked first: a prepare
    folder may have been made anew since."""
    stage = checkpoint.absolute().parent.parent
    asked = (Artifact.read(stage), Artifact.read(stage.parent / prepared_data.KIND), _imported(stage.parent / "import"))
    return next((told for artifact in asked if artifact is not None and (told := prepared_data.tokenizer_of(artifact))), {})


def _imported(stage: Path) -> Artifact | None:
    artifact = Artifact.read(stage)
    return artifact if artifact is not None and artifact.kind == "import" else None


def shaped_like(recipe: Recipe, source: Source, *, trains: bool = False) -> Recipe:
    """The recipe with the model and the tokenizer that the checkpoint was made with, which an earlier stage may have changed, and with the
    text that was prepared for it, which an import knows nothing of. How that is read is as the checkpoint's stage did, or, of one that
    `trains`, as the recipe says.

    Raises BadInputError where the checkpoint or the prepared data does not say, or the layout does not fit that model.
    """
    made_with = _made_with(source.checkpoint)
    data = made_with.data
    if trains:
        data = data.model_copy(update={key: getattr(recipe.data, key) for key in (*READING, "num_workers")})
    if source.prepared.kind == prepared_data.KIND:
        text = _made_with(source.prepared.path)
        data = data.model_copy(update={key: getattr(text.data, key) for key in text.identity(prepared_data.KIND)["data"]})
    recipe = recipe.model_copy(update={"model": made_with.model, "tokenizer": made_with.tokenizer, "data": data})
    if problems := recipe_problems(recipe):
        raise BadInputError(problems)
    return recipe


def _made_with(folder: Path) -> Recipe:
    path = folder / "config.yaml"
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInputError(f"{path} does not say what {folder.name} was made with ({error}): copy the whole folder") from error


def on_this_world(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe, unless a single process is asked to hold what was trained on many: then all of the model in one."""
    return recipe if world_size > 1 else recipe.model_copy(update={"parallel": type(recipe.parallel)()})


def without_virtual_stages(recipe: Recipe) -> Recipe:
    """The recipe with whole pipeline stages: evaluation passes one micro batch at a time, which the interleaved schedule refuses."""
    parallel = recipe.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": None})
    return recipe.model_copy(update={"parallel": parallel})


def load_model(recipe: Recipe, world: World, checkpoint: Path) -> list[GPT]:
    """This rank's chunks in eval mode, with the checkpoint's weights."""
    from largeformer.models.gpt import build_gpt
    from largeformer.training.checkpointing import load_weights

    chunks, shards = build_gpt(recipe, world.groups, world.device)
    load_weights(checkpoint, shards)
    for chunk in chunks:
        chunk.eval()
    return chunks


def inference_layout(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe as generation can run it in this world."""
    from largeformer.evaluation.generation import inference_recipe

    return inference_recipe(on_this_world(recipe, world_size))
