"""What happens to gradients between backward and step, seen in the weights after one step of plain SGD: w - lr * gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2
from tests.training.engines import PP2, TP2, TP2_SP, Tensors, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
LR = 0.1

# world size, parallel section, DeepSpeed config
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one process": (1, {}, "zero0"),
    "one process, ZeRO 1": (1, {}, "zero1"),
    "DP2": (2, {}, "zero0"),
    "DP2, ZeRO 1": (2, {}, "zero1"),
    "DP2, ZeRO 2": (2, {}, "zero2"),
    "DP2, ZeRO 3": (2, {}, "zero3"),
    "TP2": (2, TP2, "zero0"),
    "TP2 SP, ZeRO 1": (2, TP2_SP, "zero1"),
    "PP2": (2, PP2, "zero0"),
    "PP2, ZeRO 1": (2, PP2, "zero1"),
}


@dataclass(frozen=True)
class Step:
    """One step as rank 0 saw it: weights before and after, the gradients in between, the norm that was reported."""

    before: Tensors
    gradients: Tensors
    after: Tensors
    norm: float | None


def one_step(ranks: RankContext, recipe: Recipe) -> Step:
    with bench_of(ranks, recipe) as bench:
        before = bench.weights()
        done = bench.engine.accumulate(bench.share(global_batch(recipe)))
        gradients = bench.gradients()
        result = bench.engine.step(done, LR)
        return Step(before, gradients, bench.weights(), result.grad_norm)


def step_at(ranks: Ranks, layout: str, **sections: Any) -> Step:
    """A step of a tied GPT-2 with biases: every special case of a gradient at once."""
    world_size, parallel, zero = LAYOUTS[layout]
    recipe = sgd_recipe(
        **{"model": {**GPT2, "init_method_std": 0.1}, "parallel": parallel, "deepspeed": f"ds_configs/{zero}.json", **sections}
    )
    first: Step = ranks(world_size).run(one_step, recipe)[0]
    return first


def norm_of(tensors: Tensors) -> float:
    return sum(t.double().square().sum().item() for t in tensors.values()) ** 0.5


@pytest.mark.parametrize(("layout", "clip"), [*product(LAYOUTS, [0.0, 0.05]), ("one process", 1000.0), ("DP2, ZeRO 1", 1000.0)])
def test_clipping(ranks: Ranks, layout: str, clip: float) -> None:
    """The norm that is reported is that before clipping; the step is scaled by clip / norm where the norm is above, and 0 means never."""
    step = step_at(ranks, layout, optimizer={"clip_grad": clip})
    norm = norm_of(step.gradients)
    assert step.norm == pytest.approx(norm, rel=1e-6)
    assert norm > 0.05
    scale = clip / norm if 0.0 < clip < norm else 1.0
    for name, weight in step.before.items():
        expected = weight - LR * scale * step.gradients[name]
        torch.testing.assert_close(step.after[name], expected, rtol=0, atol=2.5e-7, msg=lambda text, name=name: f"{name}: {text}")
    moved = {name: step.before[name] - after for name, after in step.after.items()}
    assert norm_of(moved) == pytest.approx(LR * scale * norm, rel=1e-3)


def test_tied_gradients_are_the_sum_of_both_uses(ranks: Ranks) -> None:
    """The embedding's gradient where both uses are one parameter, where DeepSpeed holds two copies, and where a copy is cut in two."""
    whole = step_at(ranks, "one process").gradients
    for layout in ("PP2", "PP2, ZeRO 1", "TP2 SP, ZeRO 1"):
        assert_same(step_at(ranks, layout).gradients, whole, 5e-6)


PENALTIES = {"L1": (1e-3, 0.0), "L2": (0.0, 1e-2), "both": (1e-3, 1e-2)}


@pytest.mark.parametrize(("layout", "penalty"), [*product(LAYOUTS, ["both"]), ("one process", "L1"), ("one process", "L2")])
def test_penalties_count_each_matrix_once(ranks: Ranks, layout: str, penalty: str) -> None:
    """Beside a step without: w is lower by lr * (l1 sign(w) + l2 w) where w is a matrix, and no different elsewhere."""
    l1, l2 = PENALTIES[penalty]
    plain = step_at(ranks, layout)
    penalised = step_at(ranks, layout, optimizer={"l1_penalty": l1, "l2_penalty": l2})
    for key, weight in plain.before.items():
        found = (plain.after[key] - penalised.after[key]) / LR
        expected = l1 * weight.sign() + l2 * weight if weight.dim() > 1 else torch.zeros_like(weight)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_weight_decay_is_for_matrices_only(ranks: Ranks, optimizer: str) -> None:
    """Steps with and without decay differ in matrices, and for SGD and AdamW by lr * decay * w there."""
    kept, decayed = (step_at(ranks, "one process, ZeRO 1", optimizer={"type": optimizer, "weight_decay": decay}) for decay in (0.0, 0.5))
    for name, weight in kept.before.items():
        difference = kept.after[name] - decayed.after[name]
        if weight.dim() == 1:
            assert torch.equal(difference, torch.zeros_like(weight)), name
        elif optimizer == "adam":
            assert difference.norm() > 0, name
        else:
            torch.testing.assert_close(difference, LR * 0.5 * weight, rtol=0, atol=2e-7, msg=name)
