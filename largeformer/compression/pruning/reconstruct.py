"""What channels that go gave to a layer's output, given by those that stay as well as they can: least squares.

A linear layer that loses the input channels `r` and keeps `s` gets the weights W_s + W_r H_rs (H_ss + damping)^-1, where H is the sum of
x x^T over calibration text: of all [o, s] those whose outputs are closest to what they were (He et al. 2017, arXiv:1707.06168, without
its choice of channels). `o` output, `i` input channels, `s` of them stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from largeformer.compression.layerwise import Statistic, walk
from largeformer.compression.linears import Linear
from largeformer.compression.pruning.parts import Parts
from largeformer.compression.pruning.sparsegpt import Hessian
from largeformer.errors import BadInputError
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


class _Unseen:
    """Of layers that lose no input channels."""

    def update(self, inputs: torch.Tensor) -> None: ...

    def reduce(self, groups: ParallelGroups) -> None: ...


def reconstruct(
    model: Any,
    shards: Sequence[Shard],
    batches: Sequence[Batch],
    groups: ParallelGroups,
    staying: Callable[[str], torch.Tensor],
    stored: Callable[[str], torch.Tensor],
    dampening: float,
    wanted: Collection[str],
) -> dict[str, torch.Tensor]:
    """Change the layers of `model` behind feed-forward channels and heads that go, one after another, each for the text as the changed ones
    before leave it. Collective. Returns the changed weights [o, i] of the global names in `wanted`, on the CPU.

    staying, stored: by a weight's global name, which of its input channels stay, ascending, and the weight as the checkpoint has it, which
    the model may hold in a narrower dtype. What is 0 stays so. `model`: as for `layerwise.walk`.
    """
    changed: dict[str, torch.Tensor] = {}

    def observe(linear: Linear) -> Statistic:
        loses = Parts.of(linear.keys[0]).axes[1] != "hidden" and len(staying(linear.keys[0])) < linear.shape[1]
        return Hessian(linear) if loses else _Unseen()

    def change(_: int, found: Mapping[Linear, Statistic]) -> None:
        for linear, hessian in found.items():
            if isinstance(hessian, Hessian):
                name = linear.keys[0]
                whole = least_squares(stored(name).to(hessian.sum.device), hessian, staying(name).to(hessian.sum.device), dampening)
                linear.put(whole)
                if name in wanted:
                    changed[name] = whole.cpu()

    walk(model, shards, batches, groups, observe, change)
    return changed


def least_squares(weight: torch.Tensor, hessian: Hessian, stay: torch.Tensor, dampening: float) -> torch.Tensor:
    """[o, i] with zeros in the columns that do not `stay`; `dampening`: x the mean of the diagonal. Raises BadInputError where the inputs
    are not finite, or have no fit."""
    go = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    go[stay] = False
    matrix = hessian.sum.double()
    if not torch.isfinite(matrix).all():
        raise BadInputError(f"the inputs of {hessian.name} on the calibration text are not finite: begin with a sound checkpoint")
    within = matrix[stay][:, stay]
    within.diagonal().add_(dampening * matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    factor, failed = torch.linalg.cholesky_ex(within)
    if failed:
        raise BadInputError(
            f"the inputs of {hessian.name} have no invertible covariance: raise prune.dampening ({dampening}) or prune.calibration.samples"
        )
    kept = weight[:, stay].double()
    kept += torch.cholesky_solve(matrix[stay][:, go] @ weight[:, go].double().t(), factor).t()
    result = torch.zeros_like(weight)
    result[:, stay] = kept.to(weight.dtype)
    return result.masked_fill_(weight == 0, 0.0)
