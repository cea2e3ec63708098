"""The loss is the sum over valid tokens by the number of valid tokens in the whole global batch, however it is cut.

The reference is the plain PyTorch model over all rows at once. A mean of means differs from it wherever masked tokens are spread
unevenly over micro batches or ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.models.plain import PlainGPT
from largeformer.parallel.batch import Batch
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2, Tensors, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
ROWS, LENGTH = 8, 32


def nothing_in(*rows: int) -> torch.Tensor:
    mask = torch.ones(ROWS, LENGTH)
    mask[list(rows)] = 0.0
    return mask


# Over two data ranks in micro batches of one, the odd rows are those of rank 1.
MASKS: dict[str, torch.Tensor | None] = {
    "uneven": None,
    "a micro batch without any": nothing_in(3),
    "a data rank without any": nothing_in(1, 3, 5, 7),
    "one token in all": torch.zeros(ROWS, LENGTH).index_put((torch.tensor(6), torch.tensor(30)), torch.tensor(1.0)),
}

# world size, parallel section, micro batch, DeepSpeed config
CUTS: dict[str, tuple[int, dict[str, Any], int, str]] = {
    "accumulation 1": (1, {}, 8, "zero0"),
    "accumulation 4": (1, {}, 2, "zero0"),
    "accumulation 8, ZeRO 1": (1, {}, 1, "zero1"),
    "DP2": (2, {}, 1, "zero0"),
    "DP2, ZeRO 1": (2, {}, 2, "zero1"),
    "DP2, ZeRO 2": (2, {}, 1, "zero2"),
    "DP2, ZeRO 3, accumulation 1": (2, {}, 4, "zero3"),
    "TP2": (2, TP2, 2, "zero1"),
    "PP2": (2, PP2, 1, "zero0"),
}


@dataclass(frozen=True)
class Outcome:
    loss: float
    tokens: int
    weights: Tensors
    gradients: Tensors


def accumulate(ranks: RankContext, recipe: Recipe, batch: Batch) -> Outcome:
    with bench_of(ranks, recipe) as bench:
        weights = bench.weights()
        done = bench.engine.accumulate(bench.share(batch))
        return Outcome(done.loss, done.tokens, weights, bench.gradients())


def by_hand(recipe: Recipe, batch: Batch, weights: Tensors) -> tuple[float, Tensors]:
    """Loss and gradients of all rows at once, by the plain model and the formula."""
    plain = PlainGPT(recipe.model, recipe.tokenizer.vocab_size)
    plain.load_state_dict(to_hugging_face(weights, recipe.model))
    loss = plain(batch.tokens, batch.labels, batch.loss_mask) / batch.loss_mask.sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cut", CUTS)
def test_is_the_mean_over_the_whole_global_batch(ranks: Ranks, cut: str, mask: str) -> None:
    world_size, parallel, micro_batch, zero = CUTS[cut]
    recipe = sgd_recipe(parallel=parallel, train={"micro_batch_size": micro_batch}, deepspeed=f"ds_configs/{zero}.json")
    batch = global_batch(recipe, mask=MASKS[mask])
    outcomes: list[Outcome] = ranks(world_size).run(accumulate, recipe, batch)
    loss, gradients = by_hand(recipe, batch, outcomes[0].weights)
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(loss, rel=1e-6)
        assert outcome.tokens == batch.loss_mask.sum()
    assert_same(to_hugging_face(outcomes[0].gradients, recipe.model), gradients, 1e-5)


def step_on_nothing(ranks: RankContext, recipe: Recipe) -> tuple[float, float | None, Tensors, Tensors]:
    with bench_of(ranks, recipe) as bench:
        before = bench.weights()
        result = bench.engine.train_step(bench.share(global_batch(recipe, mask=torch.zeros(ROWS, LENGTH))), 0.1)
        return result.loss, result.grad_norm, before, bench.weights()


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", 0.0), ("adamw", 0.0), ("adamw", 0.5)])
@pytest.mark.parametrize(("world_size", "zero"), [(1, "zero0"), (1, "zero1"), (2, "zero3")])
def test_a_global_batch_without_any_valid_token_only_decays(ranks: Ranks, world_size: int, zero: str, optimizer: str, decay: float) -> None:
    recipe = sgd_recipe(optimizer={"type": optimizer, "clip_grad": 1.0, "weight_decay": decay}, deepspeed=f"ds_configs/{zero}.json")
    loss, norm, before, after = ranks(world_size).run(step_on_nothing, recipe)[0]
    assert (loss, norm) == (0.0, 0.0)
    for name, weight in before.items():
        expected = weight * (1.0 - 0.1 * decay) if weight.dim() > 1 else weight
        torch.testing.assert_close(after[name], expected, rtol=1e-6 if decay else 0.0, atol=0.0, msg=name)
