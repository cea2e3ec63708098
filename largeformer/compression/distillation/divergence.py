"""How far a student's probabilities are from a teacher's, over a vocabulary that tensor-parallel ranks share.

    forward KL      KL(p || q)                                   Hinton et al. 2015, arXiv:1503.02531
    reverse KL      KL(q || p)                                   Gu et al. 2023, arXiv:2306.08543
    Jensen-Shannon  (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2    Agarwal et al. 2023, arXiv:2306.13649, at beta 1/2

p: the teacher's, q: the student's probabilities. `n` tokens, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from largeformer.models.losses import Share

Divergence = Callable[[torch.Tensor, torch.Tensor, Share], tuple[torch.Tensor, torch.Tensor]]
"""(log p, log q: float32[n, v], whole distributions over the ranks' shares; the share) -> the divergences in nats, float32[n], and their
gradients by the scores whose softmax q is, float32[n, v]. Collective over the ranks that share the vocabulary."""


def forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    return share.sum((p * (log_p - log_q)).sum(dim=-1)), log_q.exp() - p


def reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    q, ratio = log_q.exp(), log_q - log_p
    divergence = share.sum((q * ratio).sum(dim=-1))
    return divergence, q * (ratio - divergence.unsqueeze(-1))


def jensen_shannon(log_p: torch.Tensor, log_q: torch.Tensor, share: Share) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    q, ratio = log_q.exp(), log_q - log_m
    of_teacher, of_student = share.sum(torch.stack([(log_p.exp() * (log_p - log_m)).sum(dim=-1), (q * ratio).sum(dim=-1)]))
    return (of_teacher + of_student) / 2.0, q * (ratio - of_student.unsqueeze(-1)) / 2.0


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({"forward_kl": forward_kl, "reverse_kl": reverse_kl, "js": jensen_shannon})
