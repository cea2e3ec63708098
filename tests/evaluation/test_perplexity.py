"""Loss totals: the arithmetic, and that each token counts once over batches and data-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largeformer.config.schema import Recipe
from largeformer.evaluation.perplexity import LossTotal, evaluate
from largeformer.models.gpt import build_gpt
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import create_groups, destroy_groups
from tests.distributed import RankContext, RankPool
from tests.one_process import Built, random_batch
from tests.recipes import tiny_recipe

TOKEN_BYTES = (np.arange(250) % 7).astype(np.int32)


def test_arithmetic() -> None:
    total = LossTotal(loss_sum=30.0, tokens=10, bytes=40)
    assert total.loss == 3.0
    assert math.isclose(total.perplexity, 20.085536923187668)
    assert math.isclose(total.bits_per_byte, 1.0820212806667227)  # 30 / ln 2 / 40
    uniform = LossTotal(loss_sum=100 * math.log(256), tokens=100, bytes=100)
    assert math.isclose(uniform.perplexity, 256) and math.isclose(uniform.bits_per_byte, 8)


def test_extremes() -> None:
    assert LossTotal(1.0e6, 10, 10).perplexity == math.inf
    assert math.isnan(LossTotal(math.nan, 10, 10).perplexity)
    nothing = LossTotal(0.0, 0, 0)
    assert math.isnan(nothing.loss) and math.isnan(nothing.perplexity) and math.isnan(nothing.bits_per_byte)


def batches() -> list[Batch]:
    made = [random_batch(250, 2, 32, seed) for seed in range(5)]
    made[3] = replace(made[3], loss_mask=torch.zeros(2, 32))
    return made


def expected(logits_of: Callable[[torch.Tensor], torch.Tensor]) -> LossTotal:
    """Token by token, with PyTorch's cross-entropy."""
    loss, tokens, text_bytes = 0.0, 0, 0
    for batch in batches():
        with torch.no_grad():
            losses = F.cross_entropy(logits_of(batch.tokens).flatten(0, 1).double(), batch.labels.flatten(), reduction="none")
        for label, counts, value in zip(batch.labels.flatten().tolist(), batch.loss_mask.flatten().tolist(), losses.tolist(), strict=True):
            if counts:
                loss, tokens, text_bytes = loss + value, tokens + 1, text_bytes + int(TOKEN_BYTES[label])
    return LossTotal(loss, tokens, text_bytes)


def test_counts_each_token_once(one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(model={"hidden_dropout": 0.3})
    built = one_process(recipe)
    built.model.train()
    total = evaluate([built.model], [batches()[:2], batches()[2:]], built.groups, TOKEN_BYTES)
    assert built.model.training, "the mode is left as it was"
    built.model.eval()
    reference = expected(lambda tokens: built.model(tokens, torch.arange(32).expand_as(tokens), None)[..., :250])
    assert (total.tokens, total.bytes) == (reference.tokens, reference.bytes)
    assert total.loss_sum == pytest.approx(reference.loss_sum, rel=1e-6)
    assert all(parameter.grad is None for parameter in built.model.parameters())


def evaluated(ranks: RankContext, recipe: Recipe) -> LossTotal:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    chunks, _ = build_gpt(recipe, groups, device)
    seed_ranks(1, groups.coordinates.tensor, groups.coordinates.data, groups.coordinates.pipeline)
    place, degree = groups.coordinates.data, groups.layout.data
    mine = [[batch] for batch in batches()[place::degree]]
    total = evaluate(chunks, mine, groups, TOKEN_BYTES)
    destroy_groups()
    return total


LAYOUTS = {
    "data parallel, unequal shares": {},
    "tensor parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(name: str, ranks: Callable[[int], RankPool], one_process: Callable[[Recipe], Built]) -> None:
    built = one_process(tiny_recipe())
    alone = evaluate([built.model], [[batch] for batch in batches()], built.groups, TOKEN_BYTES)
    for total in ranks(2).run(evaluated, tiny_recipe(parallel=LAYOUTS[name])):
        assert (total.tokens, total.bytes) == (alone.tokens, alone.bytes)
        assert total.loss_sum == pytest.approx(alone.loss_sum, rel=1e-6)
