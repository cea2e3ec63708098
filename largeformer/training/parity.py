"""One training step, measured in full, so that two layouts of one recipe can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from largeformer.config.schema import Recipe
from largeformer.data.packing import Packing
from largeformer.models.gather import gather_full
from largeformer.models.gpt import build_gpt
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.training.engine import build_engine


@dataclass(frozen=True)
class Measurement:
    """A step at the recipe's learning rate. `next_loss`: of the same batch, after it. `gradients`, `values`: float32 by global
    name, before clipping and after the step; on rank 0 alone, where they stand whole in memory."""

    loss: float
    grad_norm: float
    next_loss: float
    gradients: dict[str, torch.Tensor]
    values: dict[str, torch.Tensor]

    def write(self, path: Path) -> None:
        tensors = {f"{kind}.{key}": value for kind in ("gradients", "values") for key, value in getattr(self, kind).items()}
        numbers = {"loss": self.loss, "grad_norm": self.grad_norm, "next_loss": self.next_loss}
        save_file(tensors, path, {"numbers": json.dumps(numbers)})

    @classmethod
    def read(cls, path: Path) -> Measurement:
        kinds: dict[str, dict[str, torch.Tensor]] = {"gradients": {}, "values": {}}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                kind, key = name.split(".", 1)
                kinds[kind][key] = file.get_tensor(name)
            numbers = json.loads(file.metadata()["numbers"])
        return cls(**numbers, gradients=kinds["gradients"], values=kinds["values"])


@dataclass(frozen=True)
class Difference:
    """`error`: relative, of a number or of a tensor's norm; infinite where one side is missing, misshapen or not finite."""

    what: str
    error: float


def measure(recipe: Recipe, groups: ParallelGroups, device: torch.device, deepspeed: dict[str, Any]) -> Measurement:
    """Build the model and its engine, take one step, and gather what it did. Collective."""
    chunks, shards = build_gpt(recipe, groups, device)
    engine = build_engine(recipe, chunks, shards, groups, deepspeed)
    batches = list(uneven_batches(recipe, groups, device))
    accumulated = engine.accumulate(batches)
    gradients = gather_full(shards, lambda shard: shard.of(engine.state.gradient(shard.parameter)).clone())
    result = engine.step(accumulated, recipe.optimizer.lr)
    values = gather_full(shards, lambda shard: shard.of(engine.state.master(shard.parameter)).clone())
    next_loss = engine.accumulate(batches).loss
    engine.close()
    norm = result.grad_norm if result.grad_norm is not None else float("nan")
    return Measurement(result.loss, norm, next_loss, gradients, values)


def uneven_batches(recipe: Recipe, groups: ParallelGroups, device: torch.device) -> Iterator[Batch]:
    """This data rank's share of one global batch of random tokens; early rows have most of their labels masked, later ones few."""
    rows, length = recipe.train.global_batch_size, recipe.model.seq_length
    generator = torch.Generator().manual_seed(recipe.run.seed)
    tokens = torch.randint(recipe.tokenizer.vocab_size, (rows, length + 1), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) < torch.linspace(0.2, 1.0, rows)[:, None]).float()
    size, data = recipe.train.micro_batch_size, groups.layout.data
    # An id that stands in the batch for certain ends documents, where the recipe keeps them apart.
    packing = Packing.of(recipe.data, eod=int(tokens[0, length // 3]))
    for start in range(groups.coordinates.data * size, rows, size * data):
        ids = range(start, start + size)
        mine = slice(start, start + size)
        inputs, labels = tokens[mine, :-1].contiguous(), tokens[mine, 1:].contiguous()
        yield packing.batch(inputs.numpy(), labels.numpy(), mask[mine].numpy(), tuple(ids)).to(device)


def compare(reference: Measurement, other: Measurement) -> list[Difference]:
    """How far `other` is from `reference`, number by number and tensor by tensor."""
    differences = [
        Difference(name, _relative(getattr(other, name), getattr(reference, name))) for name in ("loss", "grad_norm", "next_loss")
    ]
    for kind in ("gradients", "values"):
        mine, theirs = getattr(reference, kind), getattr(other, kind)
        differences += [Difference(f"{kind} {key}", _distance(mine.get(key), theirs.get(key))) for key in sorted({*mine, *theirs})]
    return differences


def _relative(value: float, reference: float) -> float:
    error = abs(value - reference) / max(abs(reference), 1e-12)
    return error if error == error else float("inf")


def _distance(reference: torch.Tensor | None, other: torch.Tensor | None) -> float:
    if reference is None or other is None or reference.shape != other.shape:
        return float("inf")
    error = ((reference.double() - other.double()).norm() / reference.double().norm().clamp_min(1e-12)).item()
    return error if error == error else float("inf")
