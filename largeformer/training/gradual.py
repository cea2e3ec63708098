"""Zeros that grow in training: by magnitude, little by little along a cubic (Zhu and Gupta 2017, arXiv:1710.01878).

The mask is the zero pattern of the float32 masters. Where it grows, masters, moments and weights become 0; its gradients are 0, and so all
of it stays 0 from there. Which weights are smallest is asked of the parts that the ranks hold, at any layout and ZeRO stage: nothing is
brought together but the new masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from largeformer.checkpoint.format import Block
from largeformer.compression.pruning.magnitude import kth_smallest
from largeformer.compression.pruning.masks import qkv_rows
from largeformer.compression.pruning.sparsity import refuse_lost
from largeformer.config.prune import PruneConfig
from largeformer.config.schema import ModelConfig
from largeformer.models.shards import Shard
from largeformer.parallel.agreement import gather
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.training.checkpointing import open_tensors
from largeformer.training.engine import Engine
from largeformer.training.state import WEIGHTS
from largeformer.training.trainer import BatchSource
from largeformer.training.zero import link_moments, local_part, local_range, set_local_state


@dataclass(frozen=True, eq=False)
class Masked:
    """A parameter of a linear layer. zeros: bool, of its shape, True where it is 0 for good; grows in place. rows: int64, which of its
    matrices (queries, keys, values; gate, up) each row belongs to. shards: what it holds of global tensors."""

    parameter: torch.nn.Parameter
    zeros: torch.Tensor
    rows: torch.Tensor
    shards: Sequence[Shard]


def hold_growing(shards: Sequence[Shard], model: ModelConfig) -> list[Masked]:
    """Masks over this rank's linear layers, whose gradients are 0 from now on where the mask is: at first what is 0 already. Call it before
    the engine is built, with the weights loaded."""
    parts: dict[torch.nn.Parameter, list[Shard]] = {}
    for shard in shards:
        if ".linear_" in shard.key and len(shard.shape) == 2:
            parts.setdefault(shard.parameter, []).append(shard)
    return [_held(parameter, own, model) for parameter, own in parts.items()]


def _held(parameter: torch.nn.Parameter, own: Sequence[Shard], model: ModelConfig) -> Masked:
    zeros = parameter.detach() == 0
    parameter.register_hook(lambda gradient: gradient.masked_fill(zeros, 0.0))  # type: ignore[no-untyped-call]
    if "linear_qkv" in own[0].key:
        per_group = (model.num_attention_heads // model.query_groups + 2) * model.head_dim
        rows = qkv_rows(parameter.shape[0] // per_group, model)
    else:
        rows = torch.zeros(parameter.shape[0], dtype=torch.int64)
        for number, shard in enumerate(own):
            rows[shard.rows] = number
    return Masked(parameter, zeros, rows, own)


def assert_masks_kept(checkpoint: Path, masked: Sequence[Masked]) -> None:
    """Whatever the masks of all ranks say is 0 is so in the weights of `checkpoint`. Collective. Raises StageFailed, on every rank, where
    it is not."""
    stored, lost = open_tensors(checkpoint, WEIGHTS), Counter[str]()
    for shard, zeros in ((shard, one.zeros) for one in masked for shard in one.shards if shard.main):
        held = torch.empty(shard.shape)
        stored.read([Block(shard.key, held, shard.offset, shard.global_shape)])
        lost[shard.key] += int((held[shard.of(zeros).cpu()] != 0).sum())
    refuse_lost(+sum(gather(lost), Counter[str]()))


def share_at(step: int, prune: PruneConfig) -> float:
    """The share of zeros after `step` steps of training."""
    schedule = prune.schedule
    assert schedule is not None, "a gradual pruning has a schedule"
    left = 1 - min(max((step - schedule.start) / (schedule.end - schedule.start), 0.0), 1.0)
    return prune.share * (1 - left**3)


class GradualPruning:
    """Batches in whose course the masks grow: before the step that reads a batch, where the schedule says so. A part of the run that
    checkpoints keep: the number of steps; the zeros stand in the weights."""

    def __init__(self, engine: Engine, data: BatchSource, masked: Sequence[Masked], prune: PruneConfig) -> None:
        self._engine, self._data, self._masked, self._prune = engine, data, masked, prune
        self._step = 0

    @property
    def consumed_samples(self) -> int:
        return self._data.consumed_samples

    def next(self) -> list[Batch]:
        schedule = self._prune.schedule
        assert schedule is not None, "a gradual pruning has a schedule"
        step = self._step
        due = step == schedule.end or (step < schedule.end and (step - schedule.start) % schedule.interval == 0)
        if step > schedule.start and due:
            grow(self._engine, self._masked, share_at(step, self._prune), everywhere=self._prune.scope == "global")
        self._step += 1
        return self._data.next()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])


@torch.no_grad()
def grow(engine: Engine, masked: Sequence[Masked], share: float, *, everywhere: bool) -> None:
    """Let the smallest `share` of each matrix's masters be 0, or of all matrices' together (`everywhere`). Between steps. Collective."""
    wrapped, groups = engine.wrapped, engine.groups
    local = [_by_matrix(wrapped, one) for one in masked]
    matrices = [part for parts in local for part in parts]
    values = [matrices] if everywhere else [[part] for part in matrices]
    total = _Total(groups, everywhere=everywhere, parted=wrapped.zero_optimization_stage() > 0)
    sizes = total(torch.tensor([sum(part.numel() for part in parts) for parts in values]))
    found = kth_smallest(values, [int(int(size) * share) for size in sizes], total)
    thresholds = iter(found * len(matrices) if everywhere else found)
    for one, parts in zip(masked, local, strict=True):
        _zero(engine, one, torch.tensor([next(thresholds) for _ in parts]))


class _Total:
    """Adds up counts over the ranks that hold parts of the same matrices, or of any matrix (`everywhere`). `parted`: data-parallel ranks
    hold different parts, as under ZeRO."""

    def __init__(self, groups: ParallelGroups, *, everywhere: bool, parted: bool) -> None:
        self._groups = [groups.model if everywhere else groups.tensor, *([groups.data] if parted else [])]
        self._device = groups.device

    def __call__(self, counts: torch.Tensor) -> torch.Tensor:
        counts = counts.to(self._device)
        for group in self._groups:
            dist.all_reduce(counts, group=group)
        return counts.cpu()


def _local_rows(wrapped: Any, one: Masked) -> torch.Tensor:
    """Which matrix each element belongs to whose master this rank holds."""
    start, count = local_range(wrapped, one.parameter)
    return one.rows[torch.arange(start, start + count) // (one.zeros.numel() // len(one.rows))]


def _by_matrix(wrapped: Any, one: Masked) -> list[torch.Tensor]:
    """The magnitudes of the masters that this rank holds, by matrix: float32, flat."""
    master, rows = local_part(wrapped, one.parameter, "master").float().abs(), _local_rows(wrapped, one)
    return [master[(rows == matrix).to(master.device)].contiguous() for matrix in range(int(one.rows.max()) + 1)]


def _zero(engine: Engine, one: Masked, thresholds: torch.Tensor) -> None:
    """What is no larger than its matrix's threshold becomes 0: master, moments, mask and weight."""
    wrapped, state, parameter = engine.wrapped, engine.state, one.parameter
    kinds, steps = state.moments, state.optimizer_steps
    if kinds:
        link_moments(wrapped.optimizer)
    master = local_part(wrapped, parameter, "master")
    small = master.float().abs() <= thresholds[_local_rows(wrapped, one)].to(master.device)
    for kind in ("master", *kinds):
        value = local_part(wrapped, parameter, kind).clone()
        set_local_state(wrapped, parameter, kind, value.float().masked_fill(small, 0.0), kinds, steps)
    whole = state.master(parameter)
    one.zeros.copy_(whole.view(one.zeros.shape) == 0)
    if parameter.numel() == one.zeros.numel():  # not parted: then ZeRO 3 has set it
        parameter.data.masked_fill_(one.zeros, 0.0)
