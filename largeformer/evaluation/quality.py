"""One model beside another over the same held-out text, and how fast calls are beside each other. `v` vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F

from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Quality:
    """Over `tokens` predicted tokens, which stand for `bytes` bytes of text. `kl`: nats a token, reference against model (Kullback and
    Leibler 1951); `top1_agreement`: the share of tokens where both find the same id the likeliest. Losses in nats a token."""

    tokens: int
    bytes: int
    loss: float
    reference_loss: float
    kl: float
    top1_agreement: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def perplexity_increase(self) -> float:
        """Relative to the reference."""
        return math.expm1(min(self.loss - self.reference_loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def metrics(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("perplexity", "perplexity_increase", "bits_per_byte")}
        return {**asdict(self), **derived}


@torch.no_grad()
def compare(
    model: torch.nn.Module,
    reference: torch.nn.Module,
    batches: Iterable[Batch],
    groups: ParallelGroups,
    token_bytes: npt.NDArray[np.int32],
) -> Quality:
    """Both models over this data rank's batches; alike on every rank. Collective.

    The models: one chunk each, in eval mode, at the layout of `groups`, which has one pipeline stage. token_bytes: int32[v], the bytes of
    text that each id stands for; v without padding.
    """
    device = next(model.parameters()).device
    sizes = torch.from_numpy(np.ascontiguousarray(token_bytes)).to(device)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    for batch in batches:
        here = batch.to(device)
        counted = here.loss_mask > 0
        labels = here.labels[counted]
        ours, theirs = (_log_probabilities(one, here, len(sizes))[counted] for one in (model, reference))
        loss, reference_loss = (F.nll_loss(one, labels, reduction="sum") for one in (ours, theirs))
        kl = F.kl_div(ours, theirs, reduction="sum", log_target=True)
        agree = (ours.argmax(dim=1) == theirs.argmax(dim=1)).sum()
        sums += torch.stack([counted.sum(), sizes[labels].sum(), loss, reference_loss, kl, agree]).double()
    dist.all_reduce(sums, group=groups.data)
    tokens, text_bytes, loss_sum, reference_sum, kl_sum, agreed = sums.tolist()
    count = max(tokens, 1.0)
    kl = max(kl_sum / count, 0.0)  # in this order, which keeps NaN
    return Quality(round(tokens), round(text_bytes), loss_sum / count, reference_sum / count, kl, agreed / count)


def _log_probabilities(model: torch.nn.Module, batch: Batch, vocab_size: int) -> torch.Tensor:
    """float32[b, s, v]."""
    logits: torch.Tensor = model(batch.tokens, batch.position_ids, batch.attention_mask(), runtime_gather_output=True)
    return logits[..., :vocab_size].float().log_softmax(dim=-1)


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` calls of each. They take turns, so that a busy moment meets all of them."""
    best = dict.fromkeys(calls, math.inf)
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number > 0:  # the first allocates
                best[name] = min(best[name], time.perf_counter() - started)
    return best
