"""Which weights of a matrix become 0: by magnitude, by Wanda's or SparseGPT's measure; a share of them, or all but N of each M in a row.

Matrices are those that other programs know: queries, keys, values, gate and up each by itself. `o` output, `i` input channels, `n` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from largeformer.compression.linears import Linear
from largeformer.config.schema import ModelConfig
from largeformer.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Amount:
    """How much becomes 0: of each M that follow each other in a row all but N (`kept_of`), else a share."""

    share: float
    kept_of: tuple[int, int] | None = None


def matrix_of_rows(linear: Linear, model: ModelConfig) -> torch.Tensor:
    """int64[o]: which of its matrices each row of the whole weight belongs to."""
    if linear.name.endswith("linear_qkv"):
        return qkv_rows(model.query_groups, model)
    sizes = [shard.global_shape[0] for shard in linear.shards]
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def qkv_rows(groups: int, model: ModelConfig) -> torch.Tensor:
    """The same of `groups` query groups' rows: 0 queries, 1 keys, 2 values."""
    per_group = model.num_attention_heads // model.query_groups
    kinds = torch.tensor([0] * per_group + [1, 2]).repeat_interleave(model.head_dim)
    return kinds.repeat(groups)


def by_matrix(weight: torch.Tensor, rows: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[o, i] with `change` done to each of its matrices, float32 in between. `rows`: of `matrix_of_rows`."""
    result = torch.empty_like(weight)
    for matrix in range(int(rows.max()) + 1):
        mine = (rows == matrix).to(weight.device)
        result[mine] = change(weight[mine].float()).to(weight.dtype)
    return result


def smallest(scores: torch.Tensor, amount: Amount) -> torch.Tensor:
    """bool[o, i]: of scores [o, i] the smallest over all of it; of equal ones the first."""
    if amount.kept_of is not None:
        return _all_but(scores, *amount.kept_of)
    return _first(scores.flatten()[None], int(scores.numel() * amount.share)).view_as(scores)


def smallest_of_rows(scores: torch.Tensor, amount: Amount) -> torch.Tensor:
    """The same in each row by itself."""
    return _all_but(scores, *amount.kept_of) if amount.kept_of is not None else _first(scores, int(scores.shape[1] * amount.share))


def _first(scores: torch.Tensor, count: int) -> torch.Tensor:
    order = torch.sort(scores, dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _all_but(scores: torch.Tensor, kept: int, of: int) -> torch.Tensor:
    return _first(scores.reshape(-1, of), of - kept).view_as(scores)


class InputNorms:
    """The squared L2 norm of each input channel over all tokens: what Wanda multiplies magnitudes by."""

    def __init__(self, linear: Linear) -> None:
        self.squares = torch.zeros(linear.shape[1], dtype=torch.float64, device=linear.shards[0].parameter.device)

    def update(self, inputs: torch.Tensor) -> None:
        self.squares += inputs.double().square().sum(0)

    def reduce(self, groups: ParallelGroups) -> None:
        dist.all_reduce(self.squares, group=groups.data)


def wanda(weight: torch.Tensor, norms: InputNorms, amount: Amount) -> torch.Tensor:
    """[o, i] with zeros where |weight| x norm of its input is smallest in the row (Sun et al. 2023, arXiv:2306.11695)."""
    scores = weight.abs() * norms.squares.sqrt().float()
    return weight.masked_fill(smallest_of_rows(scores, amount), 0.0)
