"""A world of one rank inside the test process, for what needs a model but no second rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from largeformer.config.schema import Recipe
from largeformer.models.gather import gather_full
from largeformer.models.gpt import GPT, build_gpt
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import ParallelGroups, create_groups, destroy_groups, join_world

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Built:
    """A recipe's model in one process."""

    model: GPT
    shards: list[Shard]
    groups: ParallelGroups

    def weights(self) -> dict[str, torch.Tensor]:
        """The global tensors, copied."""
        return gather_full(self.shards, lambda shard: shard.of(shard.parameter))

    def gradients(self) -> dict[str, torch.Tensor]:
        return gather_full(self.shards, lambda shard: shard.of(shard.parameter.grad))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[Callable[[Recipe], Built]]:
    """`one_process(recipe)` builds its model; groups are made for the test and gone after it."""
    device = prepare_device(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products; threads would only wait for each other
    joined_before = dist.is_initialized()
    join_world(0, 1, f"file://{tmp_path}/store", device)
    seed_ranks(1, 0, 0, 0)
    made: list[ParallelGroups] = []

    def build(recipe: Recipe) -> Built:
        if not made:
            made.append(create_groups(recipe.layout(1)))
        chunks, shards = build_gpt(recipe, made[0], device)
        return Built(chunks[0], shards, made[0])

    yield build
    if made:
        destroy_groups()
    if not joined_before:
        dist.destroy_process_group()
    torch.set_num_threads(threads)


def random_batch(vocab_size: int, rows: int, length: int, seed: int = 0) -> Batch:
    """Random tokens and labels; about a quarter of the labels does not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(0, vocab_size, (rows, length), generator=generator) for _ in range(2))
    mask = (torch.rand(rows, length, generator=generator) < 0.75).float()
    return Batch(tokens, labels, mask, torch.arange(length).expand(rows, length))


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Distance in units of the norm of `theirs`; NaN where either holds NaN, which no bound accepts."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()
