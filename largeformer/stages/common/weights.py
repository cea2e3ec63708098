"""A trained model for evaluation and generation, at whatever layout this world has."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from largeformer.artifact import Artifact
from largeformer.config.checks import recipe_problems
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.stages.common.world import World

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint and the prepared data of its run."""

    checkpoint: Path
    prepared: Artifact


def find_source(recipe: Recipe, source: Path | None) -> Source:
    """What `source` (a run, a stage or a checkpoint; default: the recipe's own run) means: of several checkpoints the newest whose weights
    are what was written. Collective. Raises BadInputError where there is none, or its run holds no prepared data."""
    from largeformer.checkpoint.verify import find
    from largeformer.parallel.agreement import from_main, is_main

    found = find(_trained(source or Path(recipe.run.output_dir)), recipe.checkpoint.verify == "sha256", below="weights/")
    for refused in found.refused if is_main() else ():
        _log.warning("%s; using %s instead", refused, found.checkpoint.name)
    return from_main(lambda: _with_data(recipe, found.checkpoint))


def _trained(source: Path) -> Path:
    """The stage that a run folder's weights come from: what was trained, else what was imported."""
    stages = [source / name for name in ("pretrain", "import") if (source / name / "checkpoints").is_dir()]
    return stages[0] if stages else source


def _with_data(recipe: Recipe, checkpoint: Path) -> Source:
    run_folder = checkpoint.absolute().parent.parent.parent
    for folder in (run_folder / prepared_data.KIND, prepared_data.stage_folder(recipe)):
        prepared = Artifact.read(folder)
        if prepared is not None:
            return Source(checkpoint, prepared)
    imported = Artifact.read(checkpoint.parent.parent)
    if imported is not None and imported.kind == "import":
        return Source(checkpoint, imported)
    raise BadInputError(
        f"{checkpoint} lies in no run with a {prepared_data.KIND} folder, which holds the tokenizer: copy the whole run folder"
    )


def shaped_like(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe with the model, tokenizer and data that the checkpoint was made with, which an earlier stage may have changed.

    Raises BadInputError where the checkpoint does not say, or the layout does not fit that model.
    """
    path = checkpoint / "config.yaml"
    try:
        made_with = Recipe.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInputError(f"{path} does not say what the checkpoint was made with ({error}): copy the whole checkpoint folder") from error
    recipe = recipe.model_copy(update={"model": made_with.model, "tokenizer": made_with.tokenizer, "data": made_with.data})
    if problems := recipe_problems(recipe):
        raise BadInputError(problems)
    return recipe


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
