"""What calibration text says of the inputs of linear layers: their ranges, and a scale for those that get one for all tokens.

`n` tokens, `i` input channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from largeformer.compression.layerwise import Statistic, watching
from largeformer.compression.linears import Linear
from largeformer.compression.quantization.schemes import token_scales
from largeformer.errors import BadInputError
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups

Observer = Literal["minmax", "percentile", "mse"]
_BINS = 4096
_CANDIDATES = 200  # ranges that the search of `mse` tries, evenly spaced up to the largest magnitude


class ChannelRanges:
    """The largest magnitude of each input channel, float32[i]."""

    def __init__(self, linear: Linear) -> None:
        self.largest = torch.zeros(linear.shape[1], device=linear.shards[0].parameter.device)

    def update(self, inputs: torch.Tensor) -> None:
        # NaN is larger than everything for amax, and stays.
        self.largest = torch.maximum(self.largest, inputs.float().abs().amax(dim=0))

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX, group=groups.data)


class Histogram:
    """How many magnitudes lie in each of equal bins from 0 to `largest`. Counts, so that the sum over ranks is exact."""

    def __init__(self, largest: torch.Tensor) -> None:
        self.largest = largest
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=largest.device)

    def update(self, inputs: torch.Tensor) -> None:
        bins = (inputs.float().abs() * (_BINS / self.largest)).long().clamp_(max=_BINS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=_BINS)

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.counts, group=groups.data)

    def percentile(self, percent: float) -> torch.Tensor:
        """The magnitude that `percent` of all do not exceed, to within a bin."""
        running = self.counts.double().cumsum(0)
        place = int(torch.searchsorted(running, running[-1] * percent / 100.0))
        return self.largest * ((min(place, _BINS - 1) + 1) / _BINS)

    def least_error(self) -> torch.Tensor:
        """The range whose 8-bit rounding leaves the smallest squared error: what is beyond it is cut off, what is below rounded."""
        centres = (torch.arange(_BINS, device=self.largest.device, dtype=torch.float64) + 0.5) * (self.largest.double() / _BINS)
        ranges = self.largest.double() * torch.arange(1, _CANDIDATES + 1, device=centres.device) / _CANDIDATES
        scales = token_scales(ranges).double()[:, None]
        errors = (((centres / scales).round().clamp(max=127) * scales - centres).square() * self.counts).sum(dim=1)
        return ranges[errors.argmin()].float()


def observe(model: Any, statistics: dict[Linear, Any], batches: Iterable[Batch], groups: ParallelGroups) -> None:
    """Show each linear layer's whole inputs on `batches` to its statistic, and reduce. Collective."""
    kept: dict[Linear, Statistic] = statistics
    with torch.no_grad(), watching(kept):
        for batch in batches:
            model(batch.tokens, batch.position_ids, batch.attention_mask())
    for statistic in kept.values():
        statistic.reduce(groups)


def channel_ranges(model: Any, linears: Sequence[Linear], batches: Sequence[Batch], groups: ParallelGroups) -> dict[Linear, torch.Tensor]:
    """The largest magnitude of each input channel of each linear layer. Collective. Raises BadInputError where one is not finite."""
    ranges = {linear: ChannelRanges(linear) for linear in linears}
    observe(model, ranges, batches, groups)
    broken = [linear.name for linear, found in ranges.items() if not torch.isfinite(found.largest).all()]
    if broken:
        raise BadInputError(
            f"on the calibration text the inputs of {broken[0]} are not finite: quantize a checkpoint from before the model diverged"
        )
    return {linear: found.largest for linear, found in ranges.items()}


def input_scales(
    model: Any, linears: Sequence[Linear], batches: Sequence[Batch], groups: ParallelGroups, observer: Observer, percent: float
) -> dict[Linear, torch.Tensor]:
    """For each linear layer one scale for its 8-bit inputs, float32[1]. Collective.

    minmax: the largest magnitude is the largest integer. percentile, mse: of a histogram of 4096 bins up to that magnitude.
    """
    largest = {linear: found.amax() for linear, found in channel_ranges(model, linears, batches, groups).items()}
    if observer != "minmax":
        # Inputs that are all 0 have a range too: one below any that a scale tells apart, and by which bins can be divided.
        seen = {linear: Histogram(found.clamp_min(torch.finfo(torch.float32).eps)) for linear, found in largest.items()}
        observe(model, seen, batches, groups)
        largest = {linear: found.percentile(percent) if observer == "percentile" else found.least_error() for linear, found in seen.items()}
    return {linear: token_scales(found).reshape(1) for linear, found in largest.items()}
