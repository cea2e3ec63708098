"""The engine's state in the parameters' own terms, whatever ZeRO did to it.

Weights, float32 masters, moments and gradients come out as whole tensors of this rank's shard of a parameter, one at a time,
and go in again. Functions that say so are collective over data parallel: every rank of it calls them in the same order. For a checkpoint
most of a state need not be sent: under ZeRO 1 and 2 a rank holds nearly all of its parameters whole, and writes these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from largeformer.checkpoint.format import Block, Place
from largeformer.models.shards import Shard
from largeformer.parallel.groups import ParallelGroups

WEIGHTS, OPTIMIZER = "weights", "optimizer"
ADAM = ("exp_avg", "exp_avg_sq")
MOMENTS = (*ADAM, "momentum_buffer")


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

    def kinds(self) -> tuple[str, ...]:
        """What is kept beside the weights: moments, and masters where the weights are not float32 themselves."""
        masters = any(parameter.dtype != torch.float32 for parameter, _ in self._parameters)
        return ("master", *self.moments) if masters else self.moments

    def places(self) -> dict[str, list[Place]]:
        """What `tensors` gives on this rank, by folder and in order. Collective."""
        found: dict[str, list[Place]] = {WEIGHTS: [], OPTIMIZER: []}
        kinds = self.kinds()
        for (parameter, shards), holder in zip(self._parameters, self._holders, strict=True):
            if holder == self._groups.coordinates.data:
                found[WEIGHTS] += [_place(shard.key, shard, parameter.dtype) for shard in shards]
                found[OPTIMIZER] += [_place(f"{kind}.{shard.key}", shard, torch.float32) for kind in kinds for shard in shards]
        return found

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The state, one tensor at a time, each on one rank of the world: (folder, block); weights in the model's dtype, masters and
        moments float32. A tensor may be the optimizer's own memory: use it before the next. Collective: every rank goes through to the
        end."""
        from largeformer.training.zero import link_moments

        link_moments(self._wrapped.optimizer)
        kinds, every = self.kinds(), ("master", *self.moments)
        for number, (parameter, shards) in enumerate(self._parameters):
            for kind in every if self._holders[number] is not None else ():
                whole = self._assembled(number, kind)
                if whole is None:
                    continue
                if kind == "master":
                    yield from ((WEIGHTS, shard.of(whole).to(parameter.dtype)) for shard in shards)
                if kind in kinds:
                    yield from ((OPTIMIZER, shard.of(whole)) for shard in shards)

    def load(self, kinds: Sequence[str], steps: int, read: Callable[[str, list[Block]], None]) -> bool:
        """Set masters and moments from what `read(folder, blocks)` fills in: of each parameter the part that this rank holds. The weights
        were read before the engine was made. `kinds`, `steps`: what the checkpoint has. Returns whether its moments are of use: those of
        another optimizer are not, and begin anew."""
        from largeformer.training.zero import local_range, set_local_state

        moments = [kind for kind in kinds if kind != "master"]
        of_use = set(moments) <= set(self._usual_moments)
        if not of_use:
            kinds, moments, steps = [kind for kind in kinds if kind == "master"], [], 0
        for parameter, shards in self._parameters:
            start, count = local_range(self._wrapped, parameter)
            for kind in dict.fromkeys(("master", *kinds)):
                # Masters that are the weights themselves stand there.
                folder, prefix = (OPTIMIZER, f"{kind}.") if kind in kinds else (WEIGHTS, "")
                rows = _rows_around(parameter, start, count)
                held = torch.zeros((rows.stop - rows.start, *_shape(parameter)[1:]), dtype=torch.float32)
                read(folder, [block for shard in shards if (block := _rows_of(f"{prefix}{shard.key}", shard, held, rows)) is not None])
                value = held.flatten()[start - rows.start * _row_size(parameter) :][:count]
                set_local_state(self._wrapped, parameter, kind, value, moments, steps)
        return of_use

    @property
    def _usual_moments(self) -> tuple[str, ...]:
        """What the optimizer holds once it has stepped."""
        momentum = self._base.defaults.get("momentum")  # of stochastic gradient descent alone
        return ADAM if momentum is None else ("momentum_buffer",) if momentum else ()

    @property
    def _base(self) -> torch.optim.Optimizer:
        return getattr(self._wrapped.optimizer, "optimizer", self._wrapped.optimizer)  # type: ignore[no-any-return]

    @cached_property
    def _parameters(self) -> list[tuple[torch.nn.Parameter, list[Shard]]]:
        """Each parameter with its shards; the widest dtype first, as the files want it."""
        found: dict[str, tuple[torch.nn.Parameter, list[Shard]]] = {}
        for shard in self._shards:
            found.setdefault(shard.name, (shard.parameter, []))[1].append(shard)
        return sorted(found.values(), key=lambda entry: -entry[0].dtype.itemsize)

    @cached_property
    def _ranges(self) -> list[list[tuple[int, int]]]:
        """By data-parallel rank and parameter: first element and number of those whose state the rank holds. Collective."""
        from largeformer.training.zero import local_range

        mine = [local_range(self._wrapped, parameter) for parameter, _ in self._parameters]
        held: list[Any] = [None] * self._groups.layout.data
        dist.all_gather_object(held, mine, group=self._groups.data)
        return held

    @cached_property
    def _holders(self) -> list[int | None]:
        """By parameter: the data-parallel rank that writes it; None where another tensor or pipeline rank does. One that holds the whole
        if there is one, so that nothing has to be sent, and of these the one with the least to write so far. Collective."""
        from largeformer.training.gradients import counts_here

        load = [0] * self._groups.layout.data
        holders: list[int | None] = []
        for number, (parameter, _) in enumerate(self._parameters):
            if not counts_here(parameter, self._groups):
                holders.append(None)
                continue
            size = math.prod(_shape(parameter))
            able = [rank for rank, ranges in enumerate(self._ranges) if ranges[number][1] == size] or range(len(load))
            least = min(able, key=lambda rank: load[rank])
            load[least] += size
            holders.append(least)
        return holders

    def _assembled(self, number: int, kind: str) -> torch.Tensor | None:
        """The whole (data-parallel) parameter's `kind`, on its holder. Collective over data parallel where no rank holds the whole."""
        from largeformer.training.zero import local_part

        parameter, me, holder = self._parameters[number][0], self._groups.coordinates.data, self._holders[number]
        ranges = [of_rank[number] for of_rank in self._ranges]
        shape = _shape(parameter)
        assert holder is not None
        if ranges[holder][1] == math.prod(shape):
            return local_part(self._wrapped, parameter, kind).view(shape) if me == holder else None
        part = local_part(self._wrapped, parameter, kind).to(self._groups.device)
        if me != holder:
            if part.numel():
                dist.send(part.contiguous(), dst=dist.get_global_rank(self._groups.data, holder), group=self._groups.data)
            return None
        whole = torch.empty(math.prod(shape), dtype=torch.float32, device=part.device)
        for rank, (start, count) in enumerate(ranges):
            if rank == me:
                whole[start : start + count] = part
            elif count:
                dist.recv(whole[start : start + count], src=dist.get_global_rank(self._groups.data, rank), group=self._groups.data)
        return whole.view(shape)


def weight_blocks(shards: Sequence[Shard]) -> list[Block]:
    """The weights themselves, to be read into, before DeepSpeed takes them apart."""
    return [_block(shard.key, shard, shard.of(shard.parameter.data)) for shard in shards]


def _block(name: str, shard: Shard, tensor: torch.Tensor) -> Block:
    return Block(name, tensor, shard.offset, shard.global_shape)


def _place(name: str, shard: Shard, dtype: torch.dtype) -> Place:
    return Place(name, shard.shape, dtype, shard.offset, shard.global_shape)


def _row_size(parameter: torch.nn.Parameter) -> int:
    return math.prod(_shape(parameter)[1:])


def _rows_around(parameter: torch.nn.Parameter, start: int, count: int) -> slice:
    """The rows in which the elements `start` to `start + count` of the flat parameter lie."""
    size = _row_size(parameter)
    return slice(start // size, -(-(start + count) // size) if count else start // size)


def _rows_of(name: str, shard: Shard, held: torch.Tensor, rows: slice) -> Block | None:
    """The part of a shard that lies in `rows` of its parameter, which `held` has room for; None where it has none there."""
    first, last = max(shard.rows.start, rows.start), min(shard.rows.stop, rows.stop)
    if last <= first:
        return None
    offset = (shard.offset[0] + first - shard.rows.start, *shard.offset[1:])
    return Block(name, held[first - rows.start : last - rows.start], offset, shard.global_shape)


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
