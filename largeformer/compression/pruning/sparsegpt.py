"""SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774): zeros where they cost least, and the other weights moved to make up for them.

`o` output, `i` input channels, `n` tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from largeformer.compression.linears import Linear
from largeformer.compression.pruning.masks import Amount
from largeformer.errors import BadInputError
from largeformer.parallel.groups import ParallelGroups


class Hessian:
    """The sum of x x^T over all tokens, float32[i, i]: the layer's squared error is quadratic in the weights with this matrix."""

    def __init__(self, linear: Linear) -> None:
        self.name, channels = linear.name, linear.shape[1]
        device = linear.shards[0].parameter.device
        self.sum = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def update(self, inputs: torch.Tensor) -> None:
        inputs = inputs.float()
        self.sum.addmm_(inputs.t(), inputs)

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.sum, group=groups.data)


def inverse_factor(hessian: Hessian, dampening: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor of the inverse, float32[i, i], after `dampening` x the mean of the diagonal was added to it; and bool[i],
    the channels that were never anything but 0. Raises BadInputError where there is no inverse."""
    matrix = hessian.sum.clone()
    diagonal = matrix.diagonal()
    silent = diagonal == 0
    diagonal[silent] = 1.0
    diagonal += dampening * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        return torch.linalg.cholesky(inverse, upper=True), silent
    except torch.linalg.LinAlgError:
        raise BadInputError(
            f"the inputs of {hessian.name} have no invertible covariance: raise prune.dampening ({dampening}) or prune.calibration.samples"
        ) from None


def sparsegpt(weight: torch.Tensor, factor: torch.Tensor, silent: torch.Tensor, amount: Amount, block_size: int) -> torch.Tensor:
    """[o, i] with zeros chosen block by block of columns, or in each M of a row. What is 0 already stays so, and counts. `factor`,
    `silent`: of `inverse_factor`."""
    weight = weight.clone()
    weight[:, silent] = 0.0
    held = weight == 0
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[1], block_size):
        columns = slice(start, min(start + block_size, weight.shape[1]))
        within = factor[columns, columns]
        block, zeros = weight[:, columns].clone(), held[:, columns].clone()
        if amount.kept_of is None:
            zeros |= _cheapest(block, within.diagonal(), amount.share)
        errors = torch.empty_like(block)
        for column in range(block.shape[1]):
            if amount.kept_of is not None and column % amount.kept_of[1] == 0:
                _choose_next(block, zeros, within.diagonal(), column, *amount.kept_of)
            kept = block[:, column].masked_fill(zeros[:, column], 0.0)
            errors[:, column] = (block[:, column] - kept) / within[column, column]
            block[:, column:] -= torch.outer(errors[:, column], within[column, column:])
            block[:, column] = kept
        result[:, columns] = block.masked_fill(zeros, 0.0)
        weight[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        weight[:, columns.stop :].masked_fill_(held[:, columns.stop :], 0.0)
    return result


def _cheapest(block: torch.Tensor, scale: torch.Tensor, share: float) -> torch.Tensor:
    """What costs least to remove: (w / scale)^2, of a block at once."""
    cost = (block / scale).square()
    return cost <= cost.flatten().sort().values[min(int(cost.numel() * share), cost.numel() - 1)]


def _choose_next(block: torch.Tensor, zeros: torch.Tensor, scale: torch.Tensor, column: int, kept: int, of: int) -> None:
    """Mark all but `kept` of the next `of` columns, in place."""
    columns = slice(column, column + of)
    cost = (block[:, columns] / scale[columns]).square().masked_fill(zeros[:, columns], 0.0)
    zeros[:, columns].scatter_(1, cost.topk(of - kept, dim=1, largest=False).indices, True)
