"""What a run would be, as text: the resolved recipe, who holds what, and the dict that DeepSpeed is given.

Opens no data and no tokenizer, and asks nothing of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.config.size import model_parameters, rank_parameters
from largeformer.layout import Layout, stage_layers

__all__ = ["dry_run_report", "rank_table", "recipe_yaml"]

_MOST_ROWS = 16  # a larger world shows its first and last ranks only
_SHOWN_FIRST, _SHOWN_LAST = 10, 4
_HEADER = ("rank", "data", "pipeline", "tensor", "holds")


def dry_run_report(recipe: Recipe, deepspeed: Mapping[str, Any], world_size: int) -> str:
    """The three parts under comment headings. `deepspeed` is the resolved dict; the layout must fit `world_size`."""
    layout = recipe.layout(world_size)
    parameters = model_parameters(recipe.model, recipe.padded_vocab_size)
    steps = recipe.train.global_batch_size // (recipe.train.micro_batch_size * layout.data)
    degrees = (
        f"tensor {layout.tensor}{' + sequence' if layout.sequence_parallel else ''} x pipeline {layout.pipeline}"
        f"{f' with {layout.virtual} virtual stages' if layout.virtual > 1 else ''} x data {layout.data}"
    )
    return "\n".join(
        [
            "# Recipe",
            recipe_yaml(recipe),
            f"# Layout: world size {world_size} = {degrees}; {steps} micro batches of {recipe.train.micro_batch_size} a step",
            f"# {parameters:,} parameters, at most {rank_parameters(recipe):,} a rank before ZeRO; vocabulary padded to "
            f"{recipe.padded_vocab_size:,}",
            *rank_table(recipe, layout),
            "",
            "# DeepSpeed",
            json.dumps(deepspeed, indent=2),
        ]
    )


def rank_table(recipe: Recipe, layout: Layout) -> Iterator[str]:
    """The table's lines: one row a rank, the middle left out where there are many."""
    ranks = list(range(layout.world_size))
    if layout.world_size > _MOST_ROWS:
        ranks = ranks[:_SHOWN_FIRST] + ranks[-_SHOWN_LAST:]
    held = _held(recipe)
    rows = [_HEADER]
    for rank in ranks:
        at = layout.coordinates(rank)
        rows.append((str(rank), str(at.data), str(at.pipeline), str(at.tensor), held[at.pipeline]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    for index, row in enumerate(rows):
        if layout.world_size > _MOST_ROWS and index == 1 + _SHOWN_FIRST:
            yield f"... {layout.world_size - _SHOWN_FIRST - _SHOWN_LAST} more ranks"
        *numbers, text = row
        yield "  ".join([*(cell.rjust(width) for cell, width in zip(numbers, widths, strict=False)), text])


def _held(recipe: Recipe) -> list[str]:
    """For each pipeline stage, the layers (numbered from 0) that it holds, and whether the embedding or the head."""
    parallel = recipe.parallel
    stages = stage_layers(
        recipe.model.num_layers,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size or 1,
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    texts = []
    for number, chunks in enumerate(stages):
        parts = ["embedding"] if number == 0 else []
        parts.append(("layer " if sum(map(len, chunks)) == 1 else "layers ") + ", ".join(_span(chunk) for chunk in chunks))
        texts.append(" + ".join([*parts, *(["head"] if number == len(stages) - 1 else [])]))
    return texts


def _span(layers: Sequence[int]) -> str:
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
