"""Schedules against numbers worked out by hand, PyTorch's and transformers' own schedulers, and their own contradictions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers

from largeformer.config.rules import schedule_problems
from largeformer.config.schema import OptimizerConfig
from largeformer.errors import BadInputError
from largeformer.training.schedule import LearningRateSchedule

LR, MIN_LR, WARMUP, STEPS = 1.0, 0.1, 20, 100
HALF = 60
"""The step half-way between warmup and the end."""


def schedule(train_iters: int = STEPS, warmup: int = WARMUP, **optimizer: Any) -> LearningRateSchedule:
    return LearningRateSchedule(OptimizerConfig(**{"lr": LR, "min_lr": MIN_LR, **optimizer}), train_iters, warmup)


# style -> f at the last step of warmup, half-way, at the end, and after it
BY_HAND: dict[str, tuple[float, float, float, float]] = {
    "linear": (1.0, 0.5, 0.0, 0.0),
    "cosine": (1.0, 0.5, 0.0, 0.0),
    "exponential": (1.0, 0.31622776601683794, 0.1, 0.1),
    "polynomial": (1.0, 0.25, 0.0, 0.0),
    "inverse-square-root": (1.0, 0.5773502691896258, 0.4472135954999579, 0.4472135954999579),
    "constant": (1.0, 1.0, 1.0, 1.0),
    "WSD": (1.0, 1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("style", BY_HAND)
def test_each_style_passes_through_the_points_worked_out_by_hand(style: str) -> None:
    rates = schedule(lr_decay_style=style)
    got = [rates.at(step) for step in (WARMUP, HALF, STEPS, 10 * STEPS)]
    assert got == pytest.approx([MIN_LR + (LR - MIN_LR) * f for f in BY_HAND[style]], rel=1e-12)


@pytest.mark.parametrize("style", BY_HAND)
def test_the_first_update_is_step_one_of_warmup(style: str) -> None:
    rates = schedule(lr_decay_style=style)
    assert [rates.at(step) for step in (0, 1, 2)] == pytest.approx([0.0, LR / WARMUP, 2 * LR / WARMUP])


@pytest.mark.parametrize("style", BY_HAND)
def test_the_rate_never_leaves_its_bounds_and_never_rises_after_warmup(style: str) -> None:
    rates = [schedule(lr_decay_style=style).at(step) for step in range(WARMUP, STEPS + 50)]
    assert all(MIN_LR <= rate <= LR for rate in rates)
    assert all(later <= earlier for earlier, later in pairwise(rates))


def _torch_rates(kind: type[torch.optim.lr_scheduler.LRScheduler], **arguments: Any) -> list[float]:
    """Learning rates of steps 0, 1, ..., STEPS by one of PyTorch's schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = kind(optimizer, **arguments)
    rates = []
    for _ in range(STEPS + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_is_pytorchs() -> None:
    rates = schedule(warmup=0, lr_decay_style="cosine")
    reference = _torch_rates(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS, eta_min=MIN_LR)
    assert [rates.at(step) for step in range(STEPS + 1)] == pytest.approx(reference, rel=1e-9)


def test_linear_is_pytorchs() -> None:
    rates = schedule(warmup=0, lr_decay_style="linear")
    reference = _torch_rates(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=MIN_LR, total_iters=STEPS)
    assert [rates.at(step) for step in range(STEPS + 1)] == pytest.approx(reference, rel=1e-9)


def test_polynomial_without_a_minimum_is_pytorchs() -> None:
    rates = schedule(warmup=0, lr_decay_style="polynomial", min_lr=0.0)
    reference = _torch_rates(torch.optim.lr_scheduler.PolynomialLR, total_iters=STEPS, power=2.0)
    assert [rates.at(step) for step in range(STEPS + 1)] == pytest.approx(reference, abs=1e-12)


def test_inverse_square_root_without_a_minimum_is_transformers() -> None:
    rates = schedule(lr_decay_style="inverse-square-root", min_lr=0.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=WARMUP)
    factor = scheduler.lr_lambdas[0]
    assert [rates.at(step) for step in range(STEPS + 1)] == pytest.approx([LR * factor(step) for step in range(STEPS + 1)], rel=1e-12)


@pytest.mark.parametrize(
    ("style", "f_at_half"), [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(0.1))], ids=["linear", "cosine", "exponential"]
)
def test_wsd_is_flat_until_its_last_steps(style: str, f_at_half: float) -> None:
    rates = schedule(lr_decay_style="WSD", lr_wsd_decay_iters=40, lr_wsd_decay_style=style)
    assert [rates.at(step) for step in (WARMUP, 40, 60)] == [LR, LR, LR]
    assert rates.at(61) < LR
    assert rates.at(80) == pytest.approx(MIN_LR + (LR - MIN_LR) * f_at_half)


def test_wsd_decays_over_the_last_tenth_by_default() -> None:
    rates = schedule(lr_decay_style="WSD")
    assert (rates.at(90), rates.at(95)) == (LR, pytest.approx((LR + MIN_LR) / 2))


def test_decay_may_end_before_and_after_the_run() -> None:
    assert schedule(lr_decay_style="linear", lr_decay_iters=60).at(60) == MIN_LR
    assert schedule(lr_decay_style="linear", lr_decay_iters=180).at(100) == pytest.approx((LR + MIN_LR) / 2)


@pytest.mark.parametrize("style", BY_HAND)
def test_a_run_that_is_all_warmup_reaches_the_full_rate_on_its_last_step(style: str) -> None:
    rates = schedule(train_iters=20, warmup=20, lr_decay_style=style)
    assert rates.at(20) == LR
    assert MIN_LR <= rates.at(21) <= LR


VALID = {"lr": 1.0, "min_lr": 0.1, "train_iters": 100, "warmup_iters": 20, "decay_style": "cosine"}
CONTRADICTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a minimum above the rate": ({"min_lr": 2.0}, ["min_lr 2 is above optimizer.lr 1"]),
    "warmup longer than the run": ({"warmup_iters": 101}, ["lr_warmup_iters 101 is above train_iters 100"]),
    "warmup longer than the decay": ({"decay_iters": 10}, ["lr_warmup_iters 20 is above lr_decay_iters 10"]),
    "WSD's decay longer than what is left": (
        {"decay_style": "WSD", "wsd_decay_iters": 81},
        ["lr_wsd_decay_iters 81 does not fit", "= 80"],
    ),
    "WSD's decay in another style": ({"wsd_decay_iters": 10}, ["has no meaning with lr_decay_style cosine"]),
    "two at once": ({"min_lr": 2.0, "warmup_iters": 101}, ["min_lr 2", "lr_warmup_iters 101"]),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_named(name: str) -> None:
    change, wanted = CONTRADICTIONS[name]
    problems = schedule_problems(**{**VALID, **change})
    assert len(problems) == (2 if name == "two at once" else 1)
    for words in wanted:
        assert words in " ".join(problems)


@pytest.mark.parametrize(
    "change",
    [{}, {"min_lr": 1.0}, {"warmup_iters": 0}, {"warmup_iters": 100}, {"decay_iters": 500}, {"decay_style": "WSD", "wsd_decay_iters": 80}],
    ids=str,
)
def test_what_is_no_contradiction_passes(change: dict[str, Any]) -> None:
    assert schedule_problems(**{**VALID, **change}) == []


def test_a_schedule_cannot_be_made_of_contradictions() -> None:
    with pytest.raises(BadInputError, match="lr_warmup_iters 200"):
        schedule(warmup=200)
