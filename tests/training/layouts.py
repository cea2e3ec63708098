"""One step of a recipe at its layout, on a pool of gloo ranks. The cases of many tests are recipes run through here."""

from __future__ import annotations

from typing import Any

from largeformer.config.deepspeed import resolve_deepspeed
from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool


def measured(pool: RankPool, recipe: Recipe, deepspeed: dict[str, Any]) -> Any:
    """The `training.parity.Measurement` of `recipe` on the pool's ranks, with `deepspeed` as its JSON, before "auto" is resolved."""
    return pool.run(measure_on_rank, recipe, deepspeed)[0]


def measure_on_rank(ranks: RankContext, recipe: Recipe, deepspeed: dict[str, Any]) -> Any:
    from largeformer.parallel.device import prepare_device, seed_ranks
    from largeformer.parallel.groups import create_groups, destroy_groups
    from largeformer.training.parity import measure

    device = prepare_device(ranks.rank)
    groups = create_groups(recipe.layout(ranks.world_size))
    at = groups.coordinates
    seed_ranks(recipe.run.seed, at.tensor, at.data, at.pipeline)
    try:
        measurement = measure(recipe, groups, device, resolve_deepspeed(recipe, deepspeed, ranks.world_size))
    finally:
        destroy_groups()
    return measurement if ranks.rank == 0 else None


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """A DeepSpeed JSON with that ZeRO stage."""
    return {"zero_optimization": {"stage": stage, **more}}
