"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round one column after another, and let the columns to come make up for the error.

`o` output, `i` input channels, `n` tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from largeformer.compression.linears import Linear
from largeformer.compression.quantization.schemes import Given, Scheme, rounded
from largeformer.config.quantize import GPTQConfig
from largeformer.errors import BadInputError
from largeformer.parallel.groups import ParallelGroups


class Hessian:
    """Of the squared error of a linear layer's output in one row of its weights: 2 X^T X / n, float32[i, i]."""

    def __init__(self, linear: Linear) -> None:
        self.name, size = linear.name, linear.shape[1]
        device = linear.shards[0].parameter.device
        self._sum = torch.zeros(size, size, dtype=torch.float64, device=device)
        self._count = torch.zeros(1, dtype=torch.float64, device=device)

    def update(self, inputs: torch.Tensor) -> None:
        floats = inputs.float()
        self._sum += floats.t() @ floats
        self._count += len(floats)

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self._sum, group=groups.data)
        dist.all_reduce(self._count, group=groups.data)
        if not torch.isfinite(self._sum).all():
            raise BadInputError(f"on the calibration text the inputs of {self.name} are not finite: quantize an earlier checkpoint")

    @property
    def matrix(self) -> torch.Tensor:
        return (self._sum * (2.0 / self._count)).float()


@torch.no_grad()
def gptq(weights: torch.Tensor, hessian: torch.Tensor, given: Given, scheme: Scheme, settings: GPTQConfig) -> torch.Tensor:
    """weights: [o, i]; hessian: [i, i]; given: the scales, which stay. Returns: float32[o, i], on their grid.

    A weight that is 0 stays 0, so that a pruned layer stays sparse. An input channel that is always 0 tells nothing of its weights,
    which become 0.
    """
    weights, hessian = weights.float().clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weights[:, dead] = 0
    kept = weights != 0
    columns = torch.arange(weights.shape[1], device=weights.device)
    order = hessian.diagonal().argsort(descending=True, stable=True) if settings.act_order else columns
    weights, kept, hessian = weights[:, order], kept[:, order], hessian[order][:, order]
    groups = order // (weights.shape[1] // given.scale.shape[1])
    factor = _inverse_factor(hessian, settings.dampening)
    for start in range(0, weights.shape[1], settings.block_size):
        stop = min(start + settings.block_size, weights.shape[1])
        block, errors = weights[:, start:stop], torch.zeros_like(weights[:, start:stop])
        for column in range(stop - start):
            at = start + column
            group = slice(int(groups[at]), int(groups[at]) + 1)
            own = Given(given.scale[:, group], given.zero_point[:, group] if given.zero_point is not None else None)
            before = block[:, column].clone()
            block[:, column] = rounded(before[:, None], own, scheme)[:, 0]
            errors[:, column] = (before - block[:, column]) / factor[at, at]
            later = torch.outer(errors[:, column], factor[at, at + 1 : stop])
            block[:, column + 1 :] -= later * kept[:, at + 1 : stop]
        weights[:, stop:] -= errors @ factor[start:stop, stop:] * kept[:, stop:]
    return torch.empty_like(weights).index_copy_(1, order, weights)


def _inverse_factor(hessian: torch.Tensor, dampening: float) -> torch.Tensor:
    """The upper Cholesky factor of the dampened Hessian's inverse."""
    damped = hessian.double()
    damped.diagonal().add_(dampening * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise BadInputError(
            f"quantize.gptq.dampening {dampening:g} leaves GPTQ's equations unsolvable on this calibration text: raise it, or "
            "quantize.calibration.samples"
        )
    return upper.float()
