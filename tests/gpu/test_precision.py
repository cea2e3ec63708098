"""bf16 and fp16 beside fp32, and fp16's loss scale through overflows, on a GPU's own arithmetic."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from largeformer.training.engine import StepResult
from tests.gpu.runs import TOLERANCE, assert_alike, engine_on, recipe_of, step, trained
from tests.training.engines import Bench, Tensors, assert_same

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def single(device: torch.device) -> list[StepResult]:
    """The steps in fp32."""
    return trained(device, recipe_of("fp32"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(device: torch.device, single: list[StepResult], precision: str) -> None:
    half = trained(device, recipe_of(precision, initial_loss_scale_power=10))
    assert_alike(half, single, TOLERANCE)
    assert [result.loss for result in half] != [result.loss for result in single], f"that was no {precision}"


@contextlib.contextmanager
def overflowing(bench: Bench) -> Iterator[None]:
    """Within, the gradient of one parameter is infinite."""
    handle = bench.shards[-1].parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    yield
    handle.remove()


def halves(bench: Bench) -> Tensors:
    """The weights that forward and backward use, in fp16."""
    return bench.gathered(lambda parameter: parameter.detach())


def test_an_overflow_skips_its_step_and_halves_the_scale(device: torch.device) -> None:
    recipe = recipe_of("fp16", initial_loss_scale_power=10, loss_scale_hysteresis=1)
    with engine_on(device, recipe) as bench:
        before = [step(bench, device, seed=0) for _ in range(2)]
        masters, weights, scale = bench.weights(), halves(bench), bench.engine.loss_scale
        with overflowing(bench):
            hit = step(bench, device, seed=0)
        assert hit.skipped and hit.grad_norm is None
        assert_same(bench.weights(), masters, 0)
        assert_same(halves(bench), weights, 0)
        assert (scale, bench.engine.loss_scale) == (2.0**10, 2.0**9)
        after = [step(bench, device, seed=0) for _ in range(3)]
    assert not any(result.skipped for result in (*before, *after))
    assert after[0].loss == pytest.approx(hit.loss, rel=1e-6), "the weights had not moved"
    assert [result.loss_scale for result in after] == [2.0**9] * 3
    falling = [result.loss for result in (*before, *after)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.99 * falling[0]


def test_a_scale_far_too_large_finds_its_level(device: torch.device, single: list[StepResult]) -> None:
    """Gradients really overflow fp16 here, at 2^32 times their size. Then training goes on as if nothing had been."""
    recipe = recipe_of("fp16", initial_loss_scale_power=32, loss_scale_hysteresis=1)
    with engine_on(device, recipe) as bench:
        tries = 0
        while (result := step(bench, device, seed=0)).skipped:
            tries += 1
            assert bench.engine.loss_scale == 2.0 ** (32 - tries), "each overflow halves it"
        rest = [step(bench, device, seed) for seed in range(1, len(single))]
    assert tries > 5, "2^32 was not too large, so nothing was tested"
    assert_alike([result, *rest], single, TOLERANCE)
