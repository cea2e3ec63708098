"""The parity gate: an export, opened in the program that people will open it with, against the model it was made from.

`b` windows of held-out text, `s` tokens each, `v` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from largeformer.config.export import ThresholdsConfig

GENERATED = 32
_TOKENS = 256


class Client(Protocol):
    """An export as its users run it."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64[b, s] -> float32[b, s, v]."""

    def generate(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` likeliest next tokens, one after another."""


@dataclass(frozen=True)
class Reference:
    """What the source says of the held-out text. `logits`: a file of float32[b, s, v], read window by window.

    `counted` masks windows that the text does not fill.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    counted: torch.Tensor
    logits: Path
    prompt: list[int]
    continuation: list[int]

    def window(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.load(self.logits, mmap_mode="r")[index].copy())


@dataclass(frozen=True)
class Comparison:
    """Over the counted tokens. `kl`: nats, source against export (Kullback and Leibler 1951). `largest_logit`: of the source, without its
    sign. Losses in nats for each token."""

    tokens: int
    largest_logit: float
    max_logit_difference: float
    mean_logit_difference: float
    kl: float
    top1_agreement: float
    source_perplexity: float
    perplexity: float
    same_continuation: bool

    @property
    def perplexity_increase(self) -> float:
        return self.perplexity / self.source_perplexity - 1.0

    def metrics(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity_increase": self.perplexity_increase}


# What a format can be asked for. Floats of the same dtype: rounding alone. Integers: the perplexity may rise by so much.
EXACT = ThresholdsConfig(max_logit_difference=1e-4)
SAME_FLOATS = ThresholdsConfig(max_logit_difference=1e-3)
NARROWER = ThresholdsConfig(max_kl=0.01, max_perplexity_increase=0.005)
INT8 = ThresholdsConfig(max_kl=0.05, max_perplexity_increase=0.02)
INT4 = ThresholdsConfig(max_kl=0.5, max_perplexity_increase=0.25)
_LARGE = 32.0  # logits beyond it, as GPT-2's are, are as much less exact in float32 as they are larger


def compare(reference: Reference, client: Client) -> Comparison:
    """The client's answers against the source's."""
    largest_logit = largest = mean = kl = source_loss = loss = 0.0
    agree = count = 0
    for ours, theirs, labels in _answers(reference, client):
        difference = (ours - theirs).abs()
        # NaN is larger than any threshold, and Python's max would lose it.
        largest = float(torch.tensor([largest, difference.max().nan_to_num(math.inf).item()]).max())
        largest_logit = max(largest_logit, ours.abs().max().item())
        mean += difference.mean(dim=1).sum().item()
        p, q = ours.log_softmax(dim=1), theirs.log_softmax(dim=1)
        kl += F.kl_div(q, p, reduction="sum", log_target=True).item()
        source_loss += F.nll_loss(p, labels, reduction="sum").item()
        loss += F.nll_loss(q, labels, reduction="sum").item()
        agree += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
        count += len(labels)
    continuation = client.generate(reference.prompt, len(reference.continuation))
    return Comparison(
        tokens=count,
        largest_logit=largest_logit,
        max_logit_difference=largest,
        mean_logit_difference=mean / count,
        kl=max(kl / count, 0.0),  # in this order NaN stays
        top1_agreement=agree / count,
        source_perplexity=_exp(source_loss / count),
        perplexity=_exp(loss / count),
        same_continuation=continuation == reference.continuation,
    )


def _answers(reference: Reference, client: Client) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The source's and the client's logits of the counted tokens, float64[n, v], and their labels, int64[n]: `n` at most `_TOKENS`."""
    for index, kept in enumerate(reference.counted):
        theirs = client.logits(reference.tokens[index : index + 1])[0]
        ours, labels = reference.window(index), reference.labels[index]
        for part in kept.nonzero().flatten().split(_TOKENS):
            if len(part):
                yield ours[part].double(), theirs[part].double(), labels[part]


def failures(found: Comparison, defaults: ThresholdsConfig, given: ThresholdsConfig) -> list[str]:
    """Where `found` is beyond a threshold: those given in the recipe, else the format's, for logits up to `_LARGE`."""
    limits = {**defaults.model_dump(exclude_none=True), **given.model_dump(exclude_none=True)}
    if given.max_logit_difference is None and defaults.max_logit_difference is not None:
        limits["max_logit_difference"] *= max(1.0, found.largest_logit / _LARGE)
    told = []
    checks: dict[str, tuple[float, Callable[[float, float], bool]]] = {
        "max_logit_difference": (found.max_logit_difference, lambda value, limit: value <= limit and value < math.inf),
        "max_kl": (found.kl, lambda value, limit: value <= limit),
        "min_top1_agreement": (found.top1_agreement, lambda value, limit: value >= limit),
        "max_perplexity_increase": (found.perplexity_increase, lambda value, limit: value <= limit),
    }
    for name, limit in limits.items():
        value, holds = checks[name]
        if not holds(value, limit):  # also where the value is NaN
            told.append(f"{name.partition('_')[2]} is {value:.4g}, export.thresholds.{name} is {limit:g}")
    return told


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
