"""The fused head and cross-entropy against PyTorch's own, whole and with the vocabulary shared by two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from largeformer.models.losses import HeadLoss
from largeformer.parallel.groups import join_world
from tests.distributed import RankContext, RankPool
from tests.one_process import relative_difference

HIDDEN, TOKENS = 16, 21
# name: vocabulary, padded rows, tokens in a chunk
CASES: dict[str, tuple[int, int, int]] = {
    "one chunk": (40, 40, 64),
    "chunks with a remainder": (40, 40, 8),
    "a token at a time": (40, 40, 1),
    "padded": (37, 40, 8),
    "second rank holds nothing but padding": (20, 40, 8),
}


def inputs(vocab_size: int, padded: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Hidden states, a weight whose padded rows would win if they counted, labels, and weights of tokens, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(padded, HIDDEN, generator=generator)
    weight[vocab_size:] *= 10.0
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, vocab_size - 1
    token_weights = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 4 != 3)
    return hidden.to(dtype), weight.to(dtype), labels, token_weights


def reference(vocab_size: int, padded: int, scale: float, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Loss and gradients by PyTorch, float64, over the real vocabulary."""
    hidden, weight, labels, token_weights = inputs(vocab_size, padded, dtype)
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    losses = F.cross_entropy(hidden @ weight[:vocab_size].t(), labels, reduction="none")
    loss = (losses * token_weights.double()).sum()
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def fused(ranks: RankContext, vocab_size: int, padded: int, chunk: int, scale: float) -> list[Any]:
    """This rank's share: the loss, the gradient of the hidden states (summed over ranks), that of its rows, as lists."""
    hidden, weight, labels, token_weights = inputs(vocab_size, padded)
    share = padded // ranks.world_size
    mine = weight[ranks.rank * share : (ranks.rank + 1) * share].clone().requires_grad_()
    hidden.requires_grad_()
    loss = HeadLoss.apply(hidden, mine, labels, token_weights, vocab_size, chunk, dist.group.WORLD, True)
    (loss * scale).backward()
    dist.all_reduce(hidden.grad)  # what `copy_to_tensor_model_parallel_region` does in the model
    assert hidden.grad is not None and mine.grad is not None
    return [loss.item(), hidden.grad.tolist(), mine.grad.tolist()]


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    joined_before = dist.is_initialized()
    join_world(0, 1, f"file://{tmp_path}/store", torch.device("cpu"))
    yield RankContext(0, 1)
    if not joined_before:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name: str, alone: RankContext) -> None:
    vocab_size, padded, chunk = CASES[name]
    check([fused(alone, vocab_size, padded, chunk, 0.3)], vocab_size, padded)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(name: str, ranks: Callable[[int], RankPool]) -> None:
    vocab_size, padded, chunk = CASES[name]
    check(ranks(2).run(fused, vocab_size, padded, chunk, 0.3), vocab_size, padded)


def check(by_rank: list[list[Any]], vocab_size: int, padded: int) -> None:
    loss, d_hidden, d_weight = reference(vocab_size, padded, 0.3)
    for rank_loss, rank_d_hidden, _ in by_rank:
        assert math.isclose(rank_loss, loss.item(), rel_tol=1e-6)
        assert relative_difference(torch.tensor(rank_d_hidden), d_hidden) < 1e-6
    rows = torch.cat([torch.tensor(rank_d_weight) for _, _, rank_d_weight in by_rank])
    assert relative_difference(rows, d_weight) < 1e-6
    assert not rows[vocab_size:].any()


def test_frozen_inputs_get_no_gradient(alone: RankContext) -> None:
    hidden, weight, labels, token_weights = inputs(40, 40)
    _, _, d_weight = reference(40, 40, 1.0)
    weight.requires_grad_()
    HeadLoss.apply(hidden, weight, labels, token_weights, 40, 8, dist.group.WORLD, True).backward()
    assert hidden.grad is None
    assert weight.grad is not None and relative_difference(weight.grad, d_weight) < 1e-6


def test_bf16_sums_in_fp32(alone: RankContext) -> None:
    """The loss is that of the rounded inputs to three digits; the weight's gradient gathers over chunks without rounding each sum."""
    hidden, weight, labels, token_weights = inputs(40, 40, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = HeadLoss.apply(hidden, weight, labels, token_weights, 40, 1, dist.group.WORLD, True)
    loss.backward()
    expected, d_hidden, d_weight = reference(40, 40, 1.0, torch.bfloat16)
    assert loss.dtype == torch.float32 and math.isclose(loss.item(), expected.item(), rel_tol=3e-3)
    assert hidden.grad is not None and weight.grad is not None
    assert relative_difference(hidden.grad, d_hidden) < 2e-2
    assert relative_difference(weight.grad, d_weight) < 2e-2
