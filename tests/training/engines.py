"""Engines of tiny models inside a rank of a pool, and one global batch cut for any layout.

`b` micro batch, `s` sequence.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.models.gather import gather_full
from largeformer.models.gpt import GPT, build_gpt
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import ParallelGroups, create_groups, destroy_groups
from largeformer.training.checkpointing import load_weights
from largeformer.training.engine import Engine, build_engine
from largeformer.training.zero import link_moments
from tests.distributed import RankContext
from tests.recipes import tiny_recipe

Tensors = dict[str, torch.Tensor]

TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
TP2_SP: dict[str, Any] = {**TP2, "sequence_parallel": True}
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}


def sgd_recipe(**sections: Mapping[str, Any] | str) -> Recipe:
    """Plain SGD at rate 0.1 without decay or clipping, so that a step shows the gradient; larger weights than usual, so that
    the gradient is no smaller than they are. 2 layers, 8 sequences in micro batches of one, ZeRO 0."""
    tiny: dict[str, Any] = {
        "model": {"num_layers": 2, "init_method_std": 0.1},
        "train": {"micro_batch_size": 1, "global_batch_size": 8},
        "optimizer": {"type": "sgd", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "backend": "torch"},
        "deepspeed": "ds_configs/zero0.json",
    }
    merged = {**tiny, **{name: value if isinstance(value, str) else {**tiny.get(name, {}), **value} for name, value in sections.items()}}
    return tiny_recipe(**merged)


@dataclass(frozen=True)
class Bench:
    """An engine and what the tests ask about it."""

    recipe: Recipe
    engine: Engine
    shards: Sequence[Shard]
    groups: ParallelGroups

    def share(self, batch: Batch) -> list[Batch]:
        """This data rank's micro batches of a whole global batch, in the loader's order."""
        layout, size = self.groups.layout, self.recipe.train.micro_batch_size
        first = range(self.groups.coordinates.data * size, len(batch.tokens), size * layout.data)
        return [_rows(batch, slice(begin, begin + size)) for begin in first]

    def gathered(self, value: Callable[[torch.nn.Parameter], torch.Tensor]) -> Tensors:
        """Global tensors on rank 0, of what `value` gives for each parameter: gradients, masters, moments."""
        return gather_full(self.shards, lambda shard: shard.of(value(shard.parameter)).clone())

    def weights(self) -> Tensors:
        return self.gathered(self.engine.state.master)

    def moments(self, kind: str) -> Tensors:
        """Empty before the first step."""
        if kind not in self.engine.state.moments:
            return {}
        link_moments(self.engine.wrapped.optimizer)
        return self.gathered(lambda parameter: self.engine.state.moment(parameter, kind))

    def gradients(self) -> Tensors:
        """Between backward and step."""
        return self.gathered(self.engine.state.gradient)


Alter = Callable[[list[GPT], list[Shard], ParallelGroups], Sequence[Shard]]


@contextlib.contextmanager
def bench_of(
    ranks: RankContext, recipe: Recipe, weights_from: Path | None = None, alter: Alter = lambda chunks, shards, groups: ()
) -> Iterator[Bench]:
    """The engine of `recipe` on all ranks, once in a case; its weights are initial, or those of a checkpoint. `alter`: what is done to
    chunks and shards before the engine takes them; returns what is trained along."""
    # Garbage is collected at the end of every layout. What is alive before a case are libraries: to look through them costs 0.3 s.
    # An engine that has just been let go must go first: what is frozen is never collected.
    gc.collect()
    gc.freeze()
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    at = groups.coordinates
    seed_ranks(recipe.run.seed, at.tensor, at.data, at.pipeline)
    chunks, shards = build_gpt(recipe, groups, device)
    if weights_from is not None:
        load_weights(weights_from, shards)
    shards = [*shards, *alter(chunks, shards, groups)]
    deepspeed = resolve_deepspeed(recipe, load_deepspeed(recipe), ranks.world_size)
    engine = build_engine(recipe, chunks, shards, groups, deepspeed)
    try:
        yield Bench(recipe, engine, shards, groups)
    finally:
        engine.close()
        destroy_groups()


@contextlib.contextmanager
def fp16_on_cpu() -> Iterator[None]:
    """PyTorch computes fp16 on every CPU, slowly, which a tiny model does not mind. DeepSpeed asks the accelerator whether it
    has fp16 arithmetic; that answer is all that is replaced."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True):
        yield


def global_batch(recipe: Recipe, seed: int = 5, mask: torch.Tensor | None = None) -> Batch:
    """Random tokens and labels for every row. Without `mask` (float32[rows, s]) the first rows count a fifth of their labels,
    the last all of them."""
    rows, length = recipe.train.global_batch_size, recipe.model.seq_length
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, recipe.tokenizer.vocab_size, (rows, length + 1), generator=generator)
    if mask is None:
        mask = (torch.rand(rows, length, generator=generator) < torch.linspace(0.2, 1.0, rows)[:, None]).float()
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask, torch.arange(length).expand(rows, -1).contiguous())


def assert_same(ours: Tensors, theirs: Tensors, tolerance: float) -> None:
    """The same names, and each tensor within `tolerance` of its norm; 0 asks for the same digits."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        found = ours[name]
        assert found.shape == expected.shape, name
        if tolerance == 0:
            assert torch.equal(found, expected), f"{name} differs by {(found - expected).abs().max().item():.3g}"
            continue
        distance = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1.0e-12)
        assert distance <= tolerance, f"{name} differs by {distance.item():.3g} of its norm"


def _rows(batch: Batch, rows: slice) -> Batch:
    segments = batch.segment_ids[rows] if batch.segment_ids is not None else None
    return Batch(batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows], batch.position_ids[rows], segment_ids=segments)
