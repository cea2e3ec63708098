"""The distillation loss against its formulas over the whole vocabulary in float64: whole, and shared by two ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from largeformer.compression.distillation.figures import Figures
from largeformer.compression.distillation.loss import DistillationLoss, LiveAnswer
from largeformer.config.distill import DistillConfig
from largeformer.layout import Layout
from largeformer.models.losses import HeadLoss
from largeformer.parallel.groups import ParallelGroups
from tests.distributed import RankContext, RankPool
from tests.one_process import relative_difference

HIDDEN, TEACHERS_HIDDEN, TOKENS, SCALE = 16, 24, 21, 0.3
# name: vocabulary, padded rows, tokens in a chunk, settings
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "as by default": (40, 40, 8, {}),
    "reverse KL": (40, 40, 8, {"divergence": "reverse_kl"}),
    "Jensen-Shannon": (40, 40, 8, {"divergence": "js"}),
    "padded": (37, 40, 8, {}),
    "padded, reverse KL": (37, 40, 8, {"divergence": "reverse_kl"}),
    "padded, Jensen-Shannon": (37, 40, 8, {"divergence": "js"}),
    "second rank holds nothing but padding": (20, 40, 64, {"divergence": "js"}),
    "the teacher alone": (37, 40, 1, {"alpha": 1.0, "temperature": 1.0}),
    "the labels alone": (37, 40, 8, {"alpha": 0.0}),
    "cold": (37, 40, 8, {"temperature": 0.5, "alpha": 0.4}),
}


def inputs(vocab_size: int, padded: int) -> tuple[torch.Tensor, ...]:
    """Both models' hidden states and weights, whose padded rows would win if they counted; labels, and weights of tokens, some 0."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(TOKENS, HIDDEN, generator=generator), torch.randn(TOKENS, TEACHERS_HIDDEN, generator=generator)
    weights = torch.randn(padded, HIDDEN, generator=generator), torch.randn(padded, TEACHERS_HIDDEN, generator=generator)
    for weight in weights:
        weight[vocab_size:] *= 10.0
    labels = torch.randint(0, vocab_size, (TOKENS,), generator=generator)
    labels[0], labels[1] = 0, vocab_size - 1
    token_weights = torch.rand(TOKENS, generator=generator) * (torch.arange(TOKENS) % 4 != 3)
    return *states, *weights, labels, token_weights


def divergence_of(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """From the papers, by probabilities: [n]."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log()).sum(dim=-1)

    m = (p + q) / 2
    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "js": lambda: (kl(p, m) + kl(q, m)) / 2}[kind]()


def dense(vocab_size: int, padded: int, settings: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Loss, its two parts, and gradients: float64, autograd over the real vocabulary."""
    config = DistillConfig(**settings)
    hidden, teachers, weight, teachers_weight, labels, token_weights = inputs(vocab_size, padded)
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logits, theirs = hidden @ weight[:vocab_size].t(), teachers.double() @ teachers_weight[:vocab_size].double().t()
    t = config.temperature
    kd = t * t * divergence_of((theirs / t).softmax(-1), (logits / t).softmax(-1), config.divergence)
    ce = F.cross_entropy(logits, labels, reduction="none")
    counted = token_weights.double()
    kd_sum, ce_sum = (kd * counted).sum(), (ce * counted).sum()
    loss = config.alpha * kd_sum + (1 - config.alpha) * ce_sum
    (loss * SCALE).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), kd_sum.detach() / counted.sum(), ce_sum.detach() / counted.sum(), hidden.grad, weight.grad


class Ranks(ParallelGroups):
    """All ranks share the vocabulary."""

    @property
    def tensor(self) -> dist.ProcessGroup:
        return dist.group.WORLD  # type: ignore[return-value]


def fused(ranks: RankContext, vocab_size: int, padded: int, chunk: int, settings: dict[str, Any]) -> list[Any]:
    """This rank's share: loss and parts, the gradient of the hidden states (summed over ranks), that of its rows, as lists."""
    config = DistillConfig(**settings)
    hidden, teachers, weight, teachers_weight, labels, token_weights = inputs(vocab_size, padded)
    groups = Ranks(Layout(ranks.world_size, tensor=ranks.world_size), ranks.rank, None)
    share = padded // ranks.world_size
    rows = slice(ranks.rank * share, (ranks.rank + 1) * share)
    mine = weight[rows].clone().requires_grad_()
    hidden.requires_grad_()
    figures = Figures(("kd_loss", "ce_loss"), groups)
    loss_of = DistillationLoss(config, lambda: LiveAnswer(teachers, teachers_weight[rows], config.temperature), figures).next()
    loss = HeadLoss.apply(hidden, mine, labels, token_weights, vocab_size, chunk, groups.tensor, True, None, loss_of)
    (loss * SCALE).backward()
    dist.all_reduce(hidden.grad)
    assert hidden.grad is not None and mine.grad is not None
    parts = figures.means()
    return [loss.item(), parts["kd_loss"], parts["ce_loss"], hidden.grad.tolist(), mine.grad.tolist()]


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_the_dense_formula(name: str, tensor: int, ranks: Callable[[int], RankPool]) -> None:
    vocab_size, padded, chunk, settings = CASES[name]
    loss, kd, ce, d_hidden, d_weight = dense(vocab_size, padded, settings)
    by_rank = ranks(tensor).run(fused, vocab_size, padded, chunk, settings)
    for rank_loss, rank_kd, rank_ce, rank_d_hidden, _ in by_rank:
        assert math.isclose(rank_loss, loss.item(), rel_tol=1e-6)
        assert math.isclose(rank_kd, kd.item(), rel_tol=1e-6) and math.isclose(rank_ce, ce.item(), rel_tol=1e-6)
        assert relative_difference(torch.tensor(rank_d_hidden), d_hidden) < 1e-6
    rows = torch.cat([torch.tensor(rank_d_weight) for *_, rank_d_weight in by_rank])
    assert relative_difference(rows, d_weight) < 1e-6
    assert not rows[vocab_size:].any()


def unlike(ranks: RankContext, divergence: str) -> float:
    """The loss where teacher and student say the same."""
    config = DistillConfig(divergence=divergence, alpha=1.0)  # type: ignore[arg-type]
    hidden, _, weight, _, labels, token_weights = inputs(40, 40)
    groups = Ranks(Layout(1), 0, None)
    loss_of = DistillationLoss(config, lambda: LiveAnswer(hidden, weight, config.temperature), Figures((), groups)).next()
    loss: torch.Tensor = HeadLoss.apply(hidden, weight, labels, token_weights, 40, 8, groups.tensor, False, None, loss_of)
    return loss.item()


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
def test_whoever_says_the_same_as_the_teacher_loses_nothing(divergence: str, ranks: Callable[[int], RankPool]) -> None:
    assert abs(ranks(1).run(unlike, divergence)[0]) < 1e-5
