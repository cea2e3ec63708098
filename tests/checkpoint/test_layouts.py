"""A checkpoint of any layout is read at any other: masters and moments to the last digit, and training goes on alike.

The model has what is cut in its own way: queries, keys and values of grouped heads in one matrix, SwiGLU's two halves in another, a tied
embedding, and a vocabulary that is padded differently at one process and at TP2.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from largeformer.config.schema import Recipe
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state
from largeformer.training.saving import save_checkpoint
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2_SP, Bench, Tensors, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]

# world size, parallel section, DeepSpeed config
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one process": (1, {}, "zero0"),
    "TP2": (2, TP2_SP, "zero0"),
    "PP2": (2, PP2, "zero1"),
    "DP2 ZeRO 1": (2, {}, "zero1"),
    "DP2 ZeRO 3": (2, {}, "zero3"),
    "TP2 x PP2": (4, {**TP2_SP, **PP2}, "zero1"),
}
MORE_LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "PP2, 2 virtual stages": (2, {**PP2, "virtual_pipeline_model_parallel_size": 2}, "zero1"),
    "DP2 ZeRO 2, offloaded": (2, {}, "zero2_offload_cpu"),
    "DP2 ZeRO 3, offloaded": (2, {}, "zero3_offload_cpu"),
}


@dataclass(frozen=True)
class State:
    """Gathered on rank 0, but for the random state, which is this rank's."""

    masters: Tensors
    moments: dict[str, Tensors]
    random: torch.Tensor


def recipe_at(layout: str, precision: str) -> tuple[int, Recipe]:
    world_size, parallel, zero = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    recipe = sgd_recipe(
        model={"num_layers": 4, "tie_embeddings": True, "init_method_std": 0.1, "make_vocab_size_divisible_by": 20},
        parallel=parallel,
        train={"precision": precision, "micro_batch_size": 2},
        optimizer={"type": "adamw", "lr": 1e-2, "weight_decay": 0.1, "clip_grad": 1.0},
        deepspeed=f"ds_configs/{'zero1' if precision == 'bf16' and zero == 'zero0' else zero}.json",
    )
    return world_size, recipe


def state_of(bench: Bench) -> State:
    moments = {kind: bench.moments(kind) for kind in ("exp_avg", "exp_avg_sq")}
    return State(bench.weights(), moments, torch.get_rng_state())


def train_and_save(ranks: RankContext, recipe: Recipe, folder: Path) -> tuple[State, float]:
    """The state after two steps, which is saved, and the loss of a third."""
    with bench_of(ranks, recipe) as bench:
        for seed in (1, 2):
            bench.engine.train_step(bench.share(global_batch(recipe, seed)), 1e-2)
        save_checkpoint(folder, bench.engine, TrainingState(Progress(step=2, samples=16)), "")
        state = state_of(bench)
        return state, bench.engine.train_step(bench.share(global_batch(recipe, seed=3)), 1e-2).loss


def load_and_train(ranks: RankContext, recipe: Recipe, checkpoint: Path) -> tuple[State, float]:
    with bench_of(ranks, recipe, weights_from=checkpoint) as bench:
        assert load_training_state(checkpoint, bench.engine).progress == Progress(step=2, samples=16)
        state = state_of(bench)
        return state, bench.engine.train_step(bench.share(global_batch(recipe, seed=3)), 1e-2).loss


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, State, float]]:
    """`saved(layout, precision)`: its checkpoint, made at the first request, with what rank 0 had and the next loss."""
    made: dict[tuple[str, str], tuple[Path, State, float]] = {}

    def checkpoint(layout: str, precision: str) -> tuple[Path, State, float]:
        if (layout, precision) not in made:
            folder = tmp_path_factory.mktemp("saved")
            world_size, recipe = recipe_at(layout, precision)
            state, loss = ranks(world_size).run(train_and_save, recipe, folder)[0]
            made[layout, precision] = folder / "step_00000002", state, loss
        return made[layout, precision]

    return checkpoint


# Every layout is written and read by default; the table of all pairs is slow.
QUICK = [
    ("PP2", "TP2 x PP2", "fp32"),
    ("TP2 x PP2", "DP2 ZeRO 3", "fp32"),
    ("TP2", "PP2", "fp32"),
    ("DP2 ZeRO 3", "TP2", "fp32"),
    ("PP2, 2 virtual stages", "DP2 ZeRO 3, offloaded", "fp32"),
    ("DP2 ZeRO 2, offloaded", "PP2, 2 virtual stages", "fp32"),
    ("one process", "DP2 ZeRO 1", "fp32"),
    ("DP2 ZeRO 1", "one process", "fp32"),
    ("PP2", "DP2 ZeRO 3", "bf16"),
    ("DP2 ZeRO 3", "TP2", "bf16"),
]
ALL = [(source, target, "fp32") for source, target in product(LAYOUTS, repeat=2)]
ALL += [pair for more in MORE_LAYOUTS for other in ("TP2", "DP2 ZeRO 3") for pair in ((more, other, "fp32"), (other, more, "fp32"))]
ALL += [(source, target, "bf16") for source, target in permutations(("TP2", "PP2", "DP2 ZeRO 3"), 2)]
PAIRS = [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL if pair not in QUICK)]


@pytest.mark.parametrize(("source", "target", "precision"), PAIRS)
def test_loads_at_another_layout(
    ranks: Ranks, saved: Callable[[str, str], tuple[Path, State, float]], source: str, target: str, precision: str
) -> None:
    checkpoint, before, next_loss = saved(source, precision)
    world_size, recipe = recipe_at(target, precision)
    loaded = ranks(world_size).run(load_and_train, recipe, checkpoint)
    after, loss = loaded[0]
    assert_same(after.masters, before.masters, 0)
    for kind, moments in before.moments.items():
        assert_same(after.moments[kind], moments, 0)
    assert loss == pytest.approx(next_loss, rel=2e-6 if precision == "fp32" else 1e-2)
    assert before.masters["embedding.word_embeddings.weight"].shape == (250, 64), "without the padding"
    if target == "TP2":
        assert torch.equal(loaded[0][0].random, loaded[1][0].random), "tensor-parallel ranks must drop the same"
    if target.startswith("DP2"):
        assert not torch.equal(loaded[0][0].random, loaded[1][0].random), "data-parallel ranks must not"


def test_random_states_of_another_kind_of_device_are_drawn_anew(
    ranks: Ranks, saved: Callable[[str, str], tuple[Path, State, float]], tmp_path: Path
) -> None:
    """From a GPU to a CPU, or back: the layout is the same, the generators are not."""
    checkpoint, before, _ = saved("one process", "fp32")
    copy = Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))
    states = load_file(copy / "random" / "rank_00000.safetensors")
    there = {"cuda": states["torch"].clone()} if states.pop("cuda", None) is None else {}
    save_file({**states, **there}, copy / "random" / "rank_00000.safetensors")
    world_size, recipe = recipe_at("one process", "fp32")
    ((after, _),) = ranks(world_size).run(load_and_train, recipe, copy)
    assert_same(after.masters, before.masters, 0)
    assert not torch.equal(after.random, before.random)
