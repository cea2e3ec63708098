"""Linear layers as integers: their scales, how far off their outputs are, and the model as its clients will compute it.

`o` output, `i` input channels, `n` tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from largeformer.compression.layerwise import walk
from largeformer.compression.linears import Linear
from largeformer.compression.quantization.fake_quantization import round_in
from largeformer.compression.quantization.gptq import Hessian, gptq
from largeformer.compression.quantization.names import Names
from largeformer.compression.quantization.schemes import Given, Scheme, rounded, rounded_inputs, weight_scales
from largeformer.config.quantize import GPTQConfig
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups

Scales = dict[Linear, Given]


def nearest_scales(linears: Sequence[Linear], scheme: Scheme, dtype: torch.dtype, observer: str = "minmax") -> Scales:
    """Scales that follow from the weights, in numbers that `dtype` holds. Collective over tensor parallelism."""
    return {linear: weight_scales(linear.whole(), scheme, dtype, observer) for linear in linears}


@torch.no_grad()
def gptq_layers(
    model: Any,
    shards: Sequence[Shard],
    batches: Sequence[Batch],
    groups: ParallelGroups,
    scheme: Scheme,
    settings: GPTQConfig,
    scales: Callable[[torch.Tensor], Given],
    chosen: Collection[str],
) -> dict[str, Given]:
    """Put the linear layers that are named in `chosen` on their grid, layer by layer, each with the inputs that the rounded layers before
    it give. Returns: by our names the scales, which `scales` finds for a whole matrix. Collective.
    """
    made: dict[str, Given] = {}

    def change(_: int, statistics: Mapping[Linear, Hessian]) -> None:
        for linear, hessian in statistics.items():
            if linear.name in chosen:
                weights = linear.whole()
                made[linear.name] = scales(weights)
                linear.put(gptq(weights, hessian.matrix, made[linear.name], scheme, settings))

    walk(model, shards, batches, groups, Hessian, change)
    return made


@dataclass(frozen=True)
class LayerError:
    """What becomes of one linear layer's output. `relative`: ||error|| / ||output|| over the calibration text, both without bias."""

    relative: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, in decibels."""
        return -20.0 * torch.tensor(max(self.relative, 1e-12)).log10().item()


class _OutputError:
    """Squared norms of each output channel's error and of the channel itself, [2, o]."""

    def __init__(self, floats: torch.Tensor, integers: torch.Tensor, scheme: Scheme, given: Given) -> None:
        self._floats, self._integers, self._scheme, self._given = floats.float(), integers.float(), scheme, given
        self.squares = torch.zeros(2, len(floats), dtype=torch.float64, device=floats.device)

    def update(self, inputs: torch.Tensor) -> None:
        floats = inputs.float()
        seen = rounded_inputs(floats, self._given.input_scale) if self._scheme.activations else floats
        output = floats @ self._floats.t()
        error = seen @ self._integers.t() - output
        self.squares += torch.stack([error.double().square().sum(dim=0), output.double().square().sum(dim=0)])

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.squares, group=groups.data)


def layer_errors(
    model: Any,
    shards: Sequence[Shard],
    batches: Sequence[Batch],
    groups: ParallelGroups,
    names: Names,
    scheme: Scheme,
    scales: Scales,
    integers: Callable[[Linear], torch.Tensor],
) -> dict[str, LayerError]:
    """By Hugging Face's names, for every linear layer of this float model that has scales, with the inputs that it gets in it. Collective.

    integers: the floats that stand for a layer's integers, whole [o, i].
    """
    by_name = {linear.name: given for linear, given in scales.items()}
    found: dict[str, LayerError] = {}

    def observe(linear: Linear) -> Any:
        given = by_name.get(linear.name)
        return _OutputError(linear.whole(), integers(linear), scheme, given) if given is not None else _Nothing()

    def collect(_: int, statistics: Mapping[Linear, Any]) -> None:
        for linear, error in statistics.items():
            if isinstance(error, _OutputError):
                for name, squares in names.cut(linear, error.squares.t()).items():
                    wrong, whole = squares.sum(dim=0).tolist()
                    found[name] = LayerError((wrong / whole) ** 0.5 if whole else 0.0)

    walk(model, shards, batches, groups, observe, collect)
    return found


class _Nothing:
    def update(self, inputs: torch.Tensor) -> None:
        pass

    def reduce(self, groups: ParallelGroups) -> None:
        pass


@contextlib.contextmanager
def quantized(scheme: Scheme, scales: Scales, groups: ParallelGroups) -> Iterator[None]:
    """While the block runs, the model computes as a client of its integers does: weights on their grid, inputs of 8 bits where the scheme
    says so. Collective over tensor parallelism."""
    before = {linear: linear.module.weight.detach().clone() for linear in scales}  # type: ignore[operator]
    undo = []
    for linear, given in scales.items():
        linear.put(rounded(linear.whole(), given, scheme))
        if scheme.activations:
            undo.append(round_in(linear.module, groups, linear.split_input, static=given.input_scale))
    try:
        yield
    finally:
        for put_back in undo:
            put_back()
        with torch.no_grad():
            for linear, weight in before.items():
                linear.module.weight.copy_(weight)  # type: ignore[operator, union-attr]


def with_input_scales(scales: Scales, inputs: Mapping[Linear, torch.Tensor]) -> Scales:
    return {linear: replace(given, input_scale=inputs[linear]) for linear, given in scales.items()}


def by_name(scales: Scales, names: Names) -> dict[str, Given]:
    """Cut for Hugging Face's matrices. Those that are one of ours share its input scale, as clients that fuse them need it."""
    made: dict[str, Given] = {}
    for linear, given in scales.items():
        scale = names.cut(linear, given.scale)
        zero_point = names.cut(linear, given.zero_point) if given.zero_point is not None else {}
        made |= {name: Given(scale[name], zero_point.get(name), given.input_scale) for name in scale}
    return made


def from_names(named: Mapping[str, Given], linears: Sequence[Linear], names: Names) -> Scales:
    """`by_name` undone, for those of `linears` that are named, on their device."""
    made: dict[Linear, Given] = {}
    for linear in linears:
        parts = {name: named[name] for name in names.of(linear) if name in named}
        if not parts:
            continue
        device = linear.shards[0].parameter.device
        first = next(iter(parts.values()))
        scale = names.join(linear, {name: part.scale for name, part in parts.items()}).to(device)
        zero_points = {name: part.zero_point for name, part in parts.items() if part.zero_point is not None}
        zero_point = names.join(linear, zero_points).to(device) if zero_points else None
        made[linear] = Given(scale, zero_point, first.input_scale.to(device) if first.input_scale is not None else None)
    return made
