"""The gate's figures by their formulas, and that it fails what is wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from largeformer.config.export import ThresholdsConfig
from largeformer.export import gate
from largeformer.export.gate import Comparison, Reference, compare, failures

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
LOGITS = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))


class Stub:
    """Answers with given logits."""

    def __init__(self, logits: torch.Tensor, made: Sequence[int] = (1, 2)) -> None:
        self._logits, self._made = logits, list(made)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._logits[[int((row == TOKENS).all(1).nonzero()) for row in tokens]]

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        return self._made[:count]


def reference(folder: Path) -> Reference:
    np.save(folder / "logits.npy", LOGITS.numpy())
    counted = torch.ones(2, 4, dtype=torch.bool)
    counted[1, 2:] = False
    return Reference(TOKENS, TOKENS.roll(-1, 1), counted, folder / "logits.npy", [0], [1, 2])


@pytest.mark.parametrize("at_once", [256, 3, 1])
def test_figures_are_their_formulas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("largeformer.export.gate._TOKENS", at_once)
    noise = 0.3 * torch.randn(LOGITS.shape, generator=torch.Generator().manual_seed(2))
    found = compare(reference(tmp_path), Stub(LOGITS + noise, [1, 3]))
    kept = torch.tensor([True] * 6 + [False] * 2)
    ours, theirs = LOGITS.flatten(0, 1)[kept].double(), (LOGITS + noise).flatten(0, 1)[kept].double()
    labels = TOKENS.roll(-1, 1).flatten()[kept]
    p, q = ours.softmax(1), theirs.softmax(1)
    assert found.tokens == 6
    assert found.max_logit_difference == pytest.approx((ours - theirs).abs().max().item())
    assert found.largest_logit == pytest.approx(ours.abs().max().item())
    assert found.mean_logit_difference == pytest.approx((ours - theirs).abs().mean().item())
    assert found.kl == pytest.approx((p * (p / q).log()).sum(1).mean().item())
    assert found.top1_agreement == (p.argmax(1) == q.argmax(1)).double().mean().item()
    assert found.perplexity == pytest.approx(math.exp(-q[torch.arange(6), labels].log().mean().item()))
    assert found.source_perplexity == pytest.approx(math.exp(-p[torch.arange(6), labels].log().mean().item()))
    assert found.same_continuation is False


def test_the_same_model_passes_every_threshold(tmp_path: Path) -> None:
    found = compare(reference(tmp_path), Stub(LOGITS))
    assert (found.max_logit_difference, found.kl, found.top1_agreement, found.same_continuation) == (0.0, 0.0, 1.0, True)
    assert not any(failures(found, limits, ThresholdsConfig()) for limits in (gate.EXACT, gate.SAME_FLOATS, gate.INT8, gate.INT4))


def swapped() -> torch.Tensor:
    return LOGITS[..., [1, 0, 2, 3, 4]]


@pytest.mark.parametrize(
    ("logits", "limits", "named"),
    [
        pytest.param(LOGITS + 2e-4, gate.EXACT, "max_logit_difference", id="a shift"),
        pytest.param(swapped(), gate.INT8, "max_kl", id="two ids swapped"),
        pytest.param(torch.full_like(LOGITS, math.nan), gate.INT8, "max_perplexity_increase", id="NaN"),
        pytest.param(torch.full_like(LOGITS, math.nan), gate.INT8, "max_kl", id="NaN, by its divergence"),
        pytest.param(torch.full_like(LOGITS, math.nan), gate.EXACT, "max_logit_difference", id="NaN, by its difference"),
        pytest.param(-LOGITS, ThresholdsConfig(min_top1_agreement=0.9), "min_top1_agreement", id="turned round"),
    ],
)
def test_what_is_wrong_fails(tmp_path: Path, logits: torch.Tensor, limits: ThresholdsConfig, named: str) -> None:
    told = failures(compare(reference(tmp_path), Stub(logits)), limits, ThresholdsConfig())
    assert any(f"export.thresholds.{named} is" in sentence for sentence in told)


def test_the_recipes_threshold_comes_before_the_formats() -> None:
    found = Comparison(1, 64.0, 0.01, 0.01, 0.0, 1.0, 2.0, 2.0, True)
    assert failures(found, gate.EXACT, ThresholdsConfig())
    assert not failures(found, gate.EXACT, ThresholdsConfig(max_logit_difference=0.1))
    assert failures(found, gate.EXACT, ThresholdsConfig(max_logit_difference=0.009))


@pytest.mark.parametrize(
    ("logit", "difference", "passes"),
    [(20.0, 0.9e-4, True), (32.0, 1.1e-4, False), (160.0, 4.9e-4, True), (160.0, 5.1e-4, False), (math.inf, math.inf, False)],
)
def test_large_logits_differ_by_more(logit: float, difference: float, passes: bool) -> None:
    found = Comparison(1, logit, difference, difference, 0.0, 1.0, 2.0, 2.0, True)
    assert passes is not bool(failures(found, gate.EXACT, ThresholdsConfig()))
