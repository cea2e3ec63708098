"""Distillation: the student's loss follows the teacher's probabilities over the whole vocabulary.

    loss = alpha * T^2 * D(p_T, q_T) + (1 - alpha) * cross-entropy

at each token that counts, where p_T and q_T are the teacher's and the student's softmax at temperature T, and D a divergence. The factor
T^2 keeps the gradient of the first term, which shrinks as 1 / T^2, on the scale of the second (Hinton et al. 2015, arXiv:1503.02531,
section 2); it stands here and nowhere else. `n` tokens, `h` hidden of the teacher, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from largeformer.compression.distillation.divergence import DIVERGENCES
from largeformer.compression.distillation.figures import Figures
from largeformer.config.distill import LessonConfig
from largeformer.models.losses import Share, cross_entropy, log_softmax


class Answer(Protocol):
    """What the teacher says of one micro batch."""

    def log_probabilities(self, rows: slice, log_q: torch.Tensor, share: Share) -> torch.Tensor:
        """log p_T of its tokens `rows`, float32[n, v]. log_q: the student's, for what the teacher left open. Collective over the ranks
        that share the vocabulary."""


@dataclass(frozen=True)
class LiveAnswer:
    """hidden: the teacher's last hidden states, [tokens, h]; weight: its output projection, [v, h]. The logits are made a few tokens at
    a time, and never stand whole in memory."""

    hidden: torch.Tensor
    weight: torch.Tensor
    temperature: float

    def log_probabilities(self, rows: slice, log_q: torch.Tensor, share: Share) -> torch.Tensor:
        return log_softmax((self.hidden[rows] @ self.weight.t()).float() / self.temperature, share)


class DistillationLoss:
    """The losses of the micro batches in the order in which the student sees them: each call of `next` begins another.

    answers: gives the teacher's answer to it. figures: takes the sums of `kd_loss`, T^2 included, and of `ce_loss`.
    """

    def __init__(self, settings: LessonConfig, answers: Callable[[], Answer], figures: Figures) -> None:
        self._alpha, self._temperature = settings.alpha, settings.temperature
        self._divergence = DIVERGENCES[settings.divergence]
        self._answers, self._figures = answers, figures
        self._answer: Answer

    def next(self) -> DistillationLoss:
        self._answer = self._answers()
        return self

    def __call__(
        self, logits: torch.Tensor, rows: slice, labels: torch.Tensor, token_weights: torch.Tensor, share: Share
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `TokenLoss`."""
        t = self._temperature
        log_q = log_softmax(logits.float() / t, share)
        log_p = self._answer.log_probabilities(rows, log_q, share)
        divergence, by_scores = self._divergence(log_p, log_q, share)
        gradient, ce = cross_entropy(logits, rows, labels, token_weights, share)
        kd = t**2 * divergence * token_weights
        # The scores are logits / T, so that one factor T is left of the two.
        by_scores *= (self._alpha * t * token_weights).unsqueeze(-1)
        gradient = gradient.mul_(1.0 - self._alpha).add_(by_scores)
        self._figures.add(kd_loss=kd.sum(), ce_loss=ce.sum(), tokens=token_weights.sum())
        return gradient, self._alpha * kd + (1.0 - self._alpha) * ce
