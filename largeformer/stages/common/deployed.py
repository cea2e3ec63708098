"""A checkpoint's model as its exports compute: one that is quantized rounds as its integers do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from largeformer.config.schema import Recipe
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT


def is_quantized(checkpoint: Path) -> bool:
    from largeformer.compression.quantization.description import read_description

    return read_description(checkpoint) is not None


@contextlib.contextmanager
def deployed(recipe: Recipe, world: World, checkpoint: Path) -> Iterator[GPT]:
    """The model in eval mode. `recipe` is shaped like it, and at the world's layout, which has one pipeline stage. Collective."""
    from largeformer.compression.linears import linears
    from largeformer.compression.quantization.description import read_description
    from largeformer.compression.quantization.layers import from_names, quantized
    from largeformer.compression.quantization.names import Names
    from largeformer.models.gpt import build_gpt
    from largeformer.training.checkpointing import load_weights

    (chunk,), shards = build_gpt(recipe, world.groups, world.device)
    load_weights(checkpoint, shards)
    chunk.eval()
    described = read_description(checkpoint)
    if described is None:
        yield chunk
        return
    each = [linear for layer in linears(chunk, shards, world.groups) for linear in layer]
    with quantized(described.scheme, from_names(described.given, each, Names(recipe.model)), world.groups):
        yield chunk
