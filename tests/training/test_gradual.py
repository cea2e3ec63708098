"""Zeros that grow in training: the cubic, the same masks at every layout and ZeRO stage, and nothing left of what was pruned."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from largeformer.compression.pruning.sparsity import linear_weights
from largeformer.config.prune import PruneConfig
from largeformer.config.schema import Recipe
from largeformer.parallel.batch import Batch
from largeformer.training import engine as engines
from largeformer.training.gradual import GradualPruning, Masked, hold_growing, share_at
from largeformer.training.zero import link_moments
from tests.compression.pruning.test_structured import Held
from tests.distributed import RankContext
from tests.recipes import tiny_recipe
from tests.training.engines import PP2, TP2, Tensors, bench_of, global_batch

STEPS, SHARE = 7, 0.6
PRUNE = {"method": "magnitude", "sparsity": SHARE, "schedule": {"start": 1, "end": 5, "interval": 2}}


class Again:
    """The same batch, over and over."""

    consumed_samples = 0

    def __init__(self, batches: list[Batch]) -> None:
        self._batches = batches

    def next(self) -> list[Batch]:
        return self._batches


def recipe_of(zero: int, **sections: Any) -> Recipe:
    tiny: dict[str, Any] = {
        "model": {"num_layers": 2, "init_method_std": 0.1},
        "train": {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 20},
        "optimizer": {"lr": 1.0e-2, "weight_decay": 0.1, "l1_penalty": 1.0e-4, "backend": "torch"},
        "deepspeed": f"ds_configs/zero{zero}.json",
        "prune": PRUNE,
    }
    return tiny_recipe(**{**tiny, **{name: {**tiny.get(name, {}), **value} for name, value in sections.items()}})


def pruned_in_training(ranks: RankContext, recipe: Recipe) -> tuple[list[dict[str, float]], Tensors, dict[str, Tensors]]:
    """On rank 0: by step the share of zeros of each linear weight, and at the end masters and moments."""
    masked: list[Masked] = []

    def build(recipe: Recipe, chunks: Any, shards: Any, *others: Any) -> Any:
        masked.extend(hold_growing(shards, recipe.model))
        return engines.build_engine(recipe, chunks, shards, *others)

    with mock.patch("tests.training.engines.build_engine", build), bench_of(ranks, recipe) as bench:
        pruning = GradualPruning(bench.engine, Again(bench.share(global_batch(recipe))), masked, recipe.prune)
        shares = []
        for _ in range(STEPS):
            bench.engine.train_step(pruning.next(), 1e-2)
            weights = bench.weights()
            shares.append({name: float((weights[name] == 0).float().mean()) for name in linear_weights(Held(weights))})
        link_moments(bench.engine.wrapped.optimizer)
        return shares, bench.weights(), {kind: bench.moments(kind) for kind in ("exp_avg", "exp_avg_sq")}


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ZeRO 1, DP2": (2, 1, {}),
    "ZeRO 2, DP2": (2, 2, {}),
    "ZeRO 3, DP2": (2, 3, {}),
    "ZeRO 0, TP2": (2, 0, {"parallel": TP2}),
    "ZeRO 1, PP2": (2, 1, {"parallel": PP2}),
}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_the_same_zeros_at_every_layout_and_zero_stage(ranks: Any, scope: str) -> None:
    prune = {"prune": {"scope": scope}}
    shares, weights, moments = ranks(1).run(pruned_in_training, recipe_of(0, **prune))[0]
    settings = PruneConfig.model_validate(PRUNE)
    for step, by_name in enumerate(shares):
        wanted = share_at(5 if step >= 5 else 3 if step >= 3 else 0, settings)
        sizes = {name: weights[name].numel() for name in by_name}
        found = sum(share * sizes[name] for name, share in by_name.items()) / sum(sizes.values())
        assert found == pytest.approx(wanted, abs=2e-3), step
        assert scope == "global" or all(share == pytest.approx(wanted, abs=2e-3) for share in by_name.values())
    for name in shares[-1]:
        zeros = weights[name] == 0
        assert all(not tensors[name][zeros].any() for tensors in moments.values()), name
    for case, (world, zero, sections) in CASES.items():
        if scope == "global" and "TP2" not in case and "ZeRO 3" not in case and "PP2" not in case:
            continue
        _, other, other_moments = ranks(world).run(pruned_in_training, recipe_of(zero, **sections, **prune))[0]
        for name in shares[-1]:
            zeros = other[name] == 0
            assert float((zeros != (weights[name] == 0)).float().mean()) < 1e-3, (case, name)
            assert all(not tensors[name][zeros].any() for tensors in other_moments.values()), (case, name)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_in_bf16_too(ranks: Any, zero: int) -> None:
    shares, weights, moments = ranks(2).run(pruned_in_training, recipe_of(zero, train={"precision": "bf16"}))[0]
    assert all(share == pytest.approx(SHARE, abs=2e-3) for share in shares[-1].values())
    for name in shares[-1]:
        assert all(not tensors[name][weights[name] == 0].any() for tensors in moments.values()), name


def test_the_cubic() -> None:
    prune = PruneConfig.model_validate({**PRUNE, "schedule": {"start": 10, "end": 30}})
    found = [share_at(step, prune) for step in (0, 10, 15, 20, 30, 99)]
    assert found == pytest.approx([0.0, 0.0, SHARE * (1 - 0.75**3), SHARE * (1 - 0.5**3), SHARE, SHARE])
