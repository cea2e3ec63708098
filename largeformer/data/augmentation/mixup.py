"""Mixup of embeddings, for classification (Zhang et al. 2018, arXiv:1710.09412; for sentences Guo et al. 2019, arXiv:1905.08941)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixed:
    """A batch of which each example is `share` itself and the rest its partner. `b` batch, `s` sequence, `h` hidden.

    embeddings: [b, s, h]; partners: int64[b], which example each was mixed with; mask: bool[b, s], where either has a token.
    """

    embeddings: Tensor
    partners: Tensor
    share: float
    mask: Tensor | None

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of logits [b, classes] against both labels (int64[b]), each by its share."""
        own = torch.nn.functional.cross_entropy(logits, labels)
        partner = torch.nn.functional.cross_entropy(logits, labels[self.partners])
        return self.share * own + (1 - self.share) * partner


def mixup(
    embeddings: Tensor, alpha: float, seed: int, step: int, data_rank: int = 0, mask: Tensor | None = None, *, training: bool = True
) -> Mixed:
    """Mix each example of [b, s, h] with another of the batch: share ~ Beta(alpha, alpha).

    `seed`, `step` (of micro batches) and the data-parallel rank decide, so that tensor-parallel ranks mix alike and a resumed run goes on.
    mask: bool[b, s], True where an example has a token. In evaluation (`training` False) nothing is mixed.
    """
    count = embeddings.shape[0]
    if not training or count < 2:
        return Mixed(embeddings, torch.arange(count, device=embeddings.device), 1.0, mask)
    rng = np.random.default_rng([seed, step, data_rank])
    share = float(rng.beta(alpha, alpha))
    partners = torch.from_numpy(rng.permutation(count)).to(embeddings.device)
    mixed = share * embeddings + (1 - share) * embeddings[partners]
    return Mixed(mixed, partners, share, mask | mask[partners] if mask is not None else None)
