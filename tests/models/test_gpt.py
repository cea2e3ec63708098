"""What `build_gpt` makes, beside what the parity tests compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from largeformer.models.gpt import DTYPES
from tests.compression.models import model_on
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2, LLAMA, tiny_recipe

Ranks = Callable[[int], RankPool]


def forward(ranks: RankContext, recipe: Any) -> tuple[set[torch.dtype], float]:
    with model_on(ranks, recipe) as model, torch.no_grad():
        (batch, *_) = model.batches(recipe, 2)
        logits = model.chunk(batch.tokens, batch.position_ids, None, runtime_gather_output=True)
        return {parameter.dtype for parameter in model.chunk.parameters()}, logits.float().abs().mean().item()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("style", [pytest.param(GPT2, id="GPT-2"), pytest.param(LLAMA, id="Llama")])
def test_a_model_computes_in_its_precision_without_the_engine(ranks: Ranks, style: dict[str, Any], precision: str) -> None:
    """Learned positions too."""
    ((dtypes, size),) = ranks(1).run(forward, tiny_recipe(model=style, train={"precision": precision}))
    assert dtypes == {DTYPES[precision]} and math.isfinite(size) and size > 0
