"""Text from a checkpoint, after a prompt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.config.schema import GenerateConfig, Recipe
from largeformer.parallel.environment import discover
from largeformer.stages.common import prepared_data
from largeformer.stages.common.deployed import deployed
from largeformer.stages.common.inputs import stage_before
from largeformer.stages.common.weights import Source, find_source, inference_layout, shaped_like

if TYPE_CHECKING:
    from largeformer.stages.common.world import World


def run(recipe: Recipe, source: Path | None, prompt: str, settings: GenerateConfig) -> str:
    """Print `prompt` and what the model at `source` (default: the last of the recipe's own run) goes on with, on rank 0; returns the new
    text. Raises BadInputError where there is no such model, or it has not finished and is not named."""
    from largeformer.stages.common.world import enter_world

    recipe = inference_layout(recipe, discover(os.environ).world_size)
    with enter_world(recipe, training=False) as world:
        found = find_source(recipe, source or world.from_main(lambda: stage_before(recipe, None)))
        text = continue_prompt(shaped_like(recipe, found), world, found, prompt, settings)
        if world.info.is_main:
            print(prompt + text)
    return text


def continue_prompt(recipe: Recipe, world: World, source: Source, prompt: str, settings: GenerateConfig) -> str:
    """The continuation of one prompt, of a quantized model as its integers compute; alike on every rank. `recipe` is shaped like the
    checkpoint, and at an inference layout, which is the world's."""
    from largeformer.evaluation.generation import generate

    folder = source.prepared.path
    tokenizer, ends = prepared_data.open_tokenizer(recipe, folder), world.from_main(lambda: prepared_data.answer_ends(recipe, folder))
    with deployed(recipe, world, source.checkpoint) as chunk:
        (ids,) = generate([chunk], world.groups, [tokenizer.encode(prompt)], settings, tokenizer.eod, world.device, ends)
    return tokenizer.decode(ids)
