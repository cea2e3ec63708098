"""A model on the ranks of a pool, at an inference layout: what compression works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from largeformer.config.schema import Recipe
from largeformer.models.gpt import GPT, build_gpt
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import ParallelGroups, create_groups, destroy_groups
from tests.distributed import RankContext


@dataclass(frozen=True)
class Model:
    chunk: GPT
    shards: list[Shard]
    groups: ParallelGroups

    def batches(self, recipe: Recipe, count: int) -> list[Batch]:
        """This data rank's part of `count` rows of random ids, the same at any layout."""
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(recipe.tokenizer.vocab_size, (count, recipe.model.seq_length + 1), generator=generator)
        mine = ids[self.groups.coordinates.data :: self.groups.layout.data]
        positions = torch.arange(recipe.model.seq_length)[None]
        return [Batch(row[None, :-1], row[None, 1:], torch.ones(1, recipe.model.seq_length), positions) for row in mine]


@contextmanager
def model_on(ranks: RankContext, recipe: Recipe) -> Iterator[Model]:
    """The recipe's model in eval mode, its weights far from their start, where everything is small and alike."""
    device = prepare_device(ranks.rank, ranks.world_size)
    groups = create_groups(recipe.layout(ranks.world_size))
    try:
        (chunk,), shards = build_gpt(recipe, groups, device)
        for shard in shards:
            generator = torch.Generator().manual_seed(sum(shard.key.encode()))
            noise = 0.2 * torch.randn(shard.global_shape, generator=generator)
            with torch.no_grad():
                shard.of(shard.parameter.data).add_(noise[shard.block])
        chunk.eval()
        yield Model(chunk, shards, groups)
    finally:
        destroy_groups()


def at(recipe: Recipe, tensor: int) -> Recipe:
    parallel: dict[str, Any] = {"tensor_model_parallel_size": tensor}
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel)})
