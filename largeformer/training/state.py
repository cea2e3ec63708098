"""The engine's state in the parameters' own terms, whatever ZeRO did to it.

Weights, float32 masters, moments and gradients come out as whole tensors of this rank's shard of a parameter, one at a time,
and go in again. Functions that say so are collective over data parallel: every rank of it calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from largeformer.checkpoint.format import Block
from largeformer.models.shards import Shard
from largeformer.parallel.groups import ParallelGroups

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class EngineState:
    """Reads and writes the state of a DeepSpeed engine whose parameters are described by `shards`."""

    def __init__(self, wrapped: Any, shards: Sequence[Shard], groups: ParallelGroups) -> None:
        self._wrapped = wrapped
        self._shards = shards
        self._groups = groups
        self._stage = wrapped.zero_optimization_stage()

    def gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """float32 gradient, averaged over data parallel, not yet clipped; valid between backward and step. Collective."""
        if self._stage == 0:
            assert parameter.grad is not None, "the backward reaches every parameter"
            return parameter.grad.float()
        from deepspeed.utils import safe_get_full_grad

        scale = self._wrapped.optimizer.loss_scale if self._wrapped.fp16_enabled() else 1.0
        return safe_get_full_grad(parameter).float() / scale  # type: ignore[no-any-return]

    def master(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """float32 value, as the optimizer sees it. Collective."""
        if self._stage == 0:
            return parameter.detach().float()
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).float()  # type: ignore[no-any-return]

    def moment(self, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
        """float32 moment `kind` of the optimizer. Collective."""
        if self._stage == 0:
            return self._wrapped.optimizer.state[parameter][kind].float()  # type: ignore[no-any-return]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, kind).float()  # type: ignore[no-any-return]

    @property
    def optimizer_steps(self) -> int:
        """Steps that the optimizer took: skipped ones do not count. 0 also for an optimizer that counts none."""
        return max((int(state["step"]) for state in self._base.state.values() if "step" in state), default=0)

    @property
    def moments(self) -> tuple[str, ...]:
        """The kinds of moments that the optimizer holds now; none before its first step."""
        return tuple(kind for kind in MOMENTS if any(state.get(kind) is not None for state in self._base.state.values()))

    def blocks(self, kinds: Sequence[str]) -> Iterator[Block]:
        """Copies on the CPU of this rank's part of `kinds` ("master" or moments), named `kind.key`, each counted by one rank of the world.
        Collective."""
        from largeformer.training.zero import link_moments

        link_moments(self._wrapped.optimizer)
        for kind in kinds:
            yield from self._counted_blocks(kind, self.master if kind == "master" else partial(self.moment, kind=kind))

    def weight_blocks(self) -> Iterator[Block]:
        """The same of the weights, in the model's dtype, named by their keys. Collective."""
        yield from self._counted_blocks("", lambda parameter: self.master(parameter).to(parameter.dtype))

    def load(self, kinds: Sequence[str], steps: int, read: Callable[[list[Block]], None]) -> None:
        """Set masters and moments from what `read` fills in. The weights were read before the engine was made."""
        from largeformer.training.zero import set_state

        parameters = self._by_parameter()
        # Reading is collective over the world, and pipeline stages hold different numbers of parameters: all take part in as many.
        most = round(self._groups.largest(len(parameters)))
        for parameter, shards in parameters:
            values = {kind: torch.zeros(_shape(parameter), dtype=torch.float32) for kind in kinds}
            read([_block(f"{kind}.{s.key}", s, s.of(value)) for kind, value in values.items() for s in shards])
            set_state(self._wrapped, parameter, values, steps)
        for _ in range(most - len(parameters)):
            read([])

    @property
    def _base(self) -> torch.optim.Optimizer:
        return getattr(self._wrapped.optimizer, "optimizer", self._wrapped.optimizer)  # type: ignore[no-any-return]

    def _counted_blocks(self, kind: str, value: Callable[[torch.nn.Parameter], torch.Tensor]) -> Iterator[Block]:
        from largeformer.training.gradients import counts_here

        data = self._groups.layout.data
        for number, (parameter, shards) in enumerate(self._by_parameter()):
            whole = value(parameter)
            # Data-parallel ranks hold the same: they take turns, so that all of them write.
            if counts_here(parameter, self._groups) and number % data == self._groups.coordinates.data:
                for shard in shards:
                    name = f"{kind}.{shard.key}" if kind else shard.key
                    yield _block(name, shard, shard.of(whole).detach().to("cpu", copy=True))

    def _by_parameter(self) -> list[tuple[torch.nn.Parameter, list[Shard]]]:
        found: dict[str, tuple[torch.nn.Parameter, list[Shard]]] = {}
        for shard in self._shards:
            found.setdefault(shard.name, (shard.parameter, []))[1].append(shard)
        return list(found.values())


def weight_blocks(shards: Sequence[Shard]) -> list[Block]:
    """The weights themselves, to be read into, before DeepSpeed takes them apart."""
    return [_block(shard.key, shard, shard.of(shard.parameter.data)) for shard in shards]


def _block(name: str, shard: Shard, tensor: torch.Tensor) -> Block:
    return Block(name, tensor, shard.offset, shard.global_shape)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
