"""The hand-written loop: normalised over all micro batches, clipped, and with fp32 masters where asked."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from largeformer.config.schema import OptimizerConfig
from largeformer.models.plain import PlainGPT
from largeformer.parallel.batch import Batch
from largeformer.training.plain_loop import PlainLoop
from tests.one_process import random_batch
from tests.recipes import tiny_recipe

CONFIG = OptimizerConfig(lr=1.0e-2, clip_grad=0.05, weight_decay=0.1)


def loop_of(model: PlainGPT, config: OptimizerConfig = CONFIG, masters: bool = False) -> PlainLoop:
    def loss_of(batch: Batch) -> torch.Tensor:
        loss: torch.Tensor = model(batch.tokens, batch.labels, batch.loss_mask)
        return loss

    return PlainLoop(loss_of, model.parameters(), config, masters)


@pytest.mark.parametrize("masters", [False, True])
def test_equals_one_batch_by_hand(masters: bool) -> None:
    """Micro batches of unequal weight against all rows at once, three clipped steps of PyTorch's own AdamW."""
    model = PlainGPT(tiny_recipe().model, 250)
    twin = copy.deepcopy(model)
    matrices = [p for p in twin.parameters() if p.dim() > 1]
    vectors = [p for p in twin.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0e-2, betas=(0.9, 0.95), eps=1.0e-8)
    loop = loop_of(model, masters=masters)
    batches = [random_batch(250, 2, 16, seed) for seed in (0, 1)]
    batches[1].loss_mask[0] = 0.0
    for _ in range(3):
        loss = loop.step(batches)
        logits = torch.cat([twin(batch.tokens) for batch in batches]).flatten(0, 1)
        mask = torch.cat([batch.loss_mask for batch in batches]).flatten()
        labels = torch.cat([batch.labels for batch in batches]).flatten()
        expected = (F.cross_entropy(logits, labels, reduction="none") * mask).sum() / mask.sum()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=2e-5)


def test_masters_keep_steps_that_bf16_rounds_away() -> None:
    """Steps of 1e-4 on weights of 1 are below half of bf16's spacing there (2^-8): only masters add them up."""
    config = OptimizerConfig(lr=1.0e-4, clip_grad=0.0, weight_decay=0.0)
    moved = {}
    for masters in (False, True):
        model = PlainGPT(tiny_recipe().model, 250).to(torch.bfloat16)
        loop = loop_of(model, config, masters)
        for _ in range(60):
            loop.step([random_batch(250, 2, 8)])
        moved[masters] = bool((model.model.norm.weight != 1.0).any())
    assert moved == {False: False, True: True}
