"""Penalties against autograd, and their sum over shards against the whole."""

from __future__ import annotations

import pytest
import torch

from largeformer.training.regularization import penalty_gradients, penalty_value

PENALTIES = {"L1": (0.3, 0.0), "L2": (0.0, 0.2), "both": (0.3, 0.2)}


def matrix(seed: int = 0) -> torch.nn.Parameter:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    weight[0, 0] = 0.0  # where |w| has no derivative, both take 0
    return torch.nn.Parameter(weight)


def penalty(weights: list[torch.nn.Parameter], l1: float, l2: float) -> torch.Tensor:
    return sum((l1 * w.abs().sum() + l2 / 2 * w.square().sum() for w in weights), start=torch.zeros(()))


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_and_value_are_autograds(name: str) -> None:
    l1, l2 = PENALTIES[name]
    ours, theirs = [matrix(0), matrix(1)], [matrix(0), matrix(1)]
    for weight in ours:
        (weight**3).sum().backward()
    loss = penalty(theirs, l1, l2)
    (loss + sum((w**3).sum() for w in theirs)).backward()
    penalty_gradients(ours, l1, l2)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)
    assert penalty_value(ours, lambda _: True, l1, l2) == pytest.approx(loss.item(), rel=1e-6)


def test_the_loss_scale_multiplies_the_penalty_too() -> None:
    scaled, plain = matrix(), matrix()
    (1024 * (scaled**3).sum()).backward()
    (plain**3).sum().backward()
    penalty_gradients([scaled], 0.3, 0.2, scale=1024.0)
    penalty_gradients([plain], 0.3, 0.2)
    assert scaled.grad is not None and plain.grad is not None
    torch.testing.assert_close(scaled.grad / 1024, plain.grad)


def test_shards_give_the_wholes_gradient_and_value() -> None:
    whole = matrix()
    shards = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(2)]
    duplicate = torch.nn.Parameter(shards[0].detach().clone())
    for weights in ([whole], shards, [duplicate]):
        penalty_gradients(weights, 0.3, 0.2)
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat([s.grad for s in shards if s.grad is not None]), whole.grad)
    ranks = [[shards[0]], [shards[1], duplicate]]
    parts = [penalty_value(weights, lambda w: w is not duplicate, 0.3, 0.2) for weights in ranks]
    assert sum(parts) == pytest.approx(penalty_value([whole], lambda _: True, 0.3, 0.2), rel=1e-12)


def test_frozen_parameters_and_zero_penalties_are_left_alone() -> None:
    frozen, free = matrix().requires_grad_(False), matrix()
    penalty_gradients([frozen], 0.3, 0.2)
    penalty_gradients([free], 0.0, 0.0)
    assert frozen.grad is None and free.grad is None
    assert penalty_value([frozen], lambda _: True, 0.3, 0.2) == 0.0
