"""The penalty's gradient against autograd. That every layout adds it once, to matrices alone, is in test_gradients.py."""

from __future__ import annotations

import pytest
import torch

from largeformer.training.regularization import penalty_gradient

PENALTIES = {"L1": (0.3, 0.0), "L2": (0.0, 0.2), "both": (0.3, 0.2), "none": (0.0, 0.0)}


def matrix() -> torch.Tensor:
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = 0.0  # where |w| has no derivative, both take 0
    return weight


@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_is_autograds(name: str) -> None:
    l1, l2 = PENALTIES[name]
    weight = matrix().requires_grad_()
    (l1 * weight.abs().sum() + l2 / 2 * weight.square().sum()).backward()
    torch.testing.assert_close(penalty_gradient(weight.detach(), l1, l2), weight.grad)


def test_shards_give_their_parts_of_the_wholes_gradient() -> None:
    whole = matrix()
    parts = [penalty_gradient(shard, 0.3, 0.2) for shard in whole.chunk(2)]
    assert torch.equal(torch.cat(parts), penalty_gradient(whole, 0.3, 0.2))


def test_dtype_and_shape_are_the_weights() -> None:
    weight = matrix().to(torch.bfloat16)
    gradient = penalty_gradient(weight, 0.3, 0.2)
    assert (gradient.dtype, gradient.shape) == (weight.dtype, weight.shape)
