"""`bench`: what is compared, on one rank and on two, and the arithmetic of its report. Not the speeds themselves."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.models.flops import flops_per_token
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.environment import RankInfo
from largeformer.parallel.groups import create_groups, destroy_groups
from largeformer.stages.bench import Measured, measure, report
from largeformer.stages.bench_contenders import BARE, COMPILED, ENGINE, HUGGING_FACE, PLAIN
from largeformer.stages.common.world import World
from tests.distributed import RankContext, RankPool
from tests.recipes import tiny_recipe


def measured(ranks: RankContext, recipe: Recipe, compiled: bool) -> dict[str, Any]:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    seed_ranks(1, groups.coordinates.tensor, groups.coordinates.data, groups.coordinates.pipeline)
    info = RankInfo(ranks.rank, ranks.rank, ranks.world_size, ranks.world_size, "127.0.0.1", 0, "none")
    world = World(info, device, groups, resolve_deepspeed(recipe, load_deepspeed(recipe), ranks.world_size))
    result = report(recipe, world, measure(recipe, world, rounds=2, steps=1, compiled=compiled))
    destroy_groups()
    return result


# name: sections of the recipe, ranks, who is compared, tokens of a step of largeformer and of the plain loop
CASES: dict[str, tuple[dict[str, Any], int, list[str], int, int]] = {
    "one rank": ({"train": {"precision": "bf16"}}, 1, [ENGINE, BARE, PLAIN, HUGGING_FACE], 128, 128),
    "no Hugging Face architecture": ({"model": {"position_embedding": "none"}}, 1, [ENGINE, BARE, PLAIN], 128, 128),
    "tensor parallel": (
        {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        2,
        [ENGINE, PLAIN],
        128,
        128,
    ),
    "pipeline": ({"parallel": {"pipeline_model_parallel_size": 2}}, 2, [ENGINE, PLAIN], 128, 128),
    "data parallel": ({"train": {"global_batch_size": 8}}, 2, [ENGINE, PLAIN], 256, 256),
}


@pytest.mark.parametrize("name", CASES)
def test_candidates(name: str, ranks: Callable[[int], RankPool]) -> None:
    sections, world_size, names, engine_tokens, plain_tokens = CASES[name]
    if HUGGING_FACE in names:
        pytest.importorskip("transformers")
    for result in ranks(world_size).run(measured, tiny_recipe(**sections), False):
        rows = {row["name"]: row for row in result["rows"]}
        assert list(rows) == names
        for row, tokens in ((rows[ENGINE], engine_tokens), (rows[PLAIN], plain_tokens)):
            first, second = row["seconds_per_step"]
            assert row["tokens_per_s"] == pytest.approx(2 * tokens / (first + second))
        assert rows[PLAIN]["ratio"] == pytest.approx(1.0)
        assert (result["engine_overhead"] is not None) == (world_size == 1)
        assert COMPILED not in rows


@pytest.mark.slow
def test_the_plain_loop_compiles(ranks: Callable[[int], RankPool]) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    recipe = tiny_recipe(model={"num_layers": 1}, train={"global_batch_size": 2})
    (result,) = ranks(1).run(measured, recipe, True)
    assert COMPILED in [row["name"] for row in result["rows"]]


def test_figures(one_process: Any) -> None:
    """Two candidates with round numbers: 100 tokens in 1 s, 2 s, 4 s against 200 in 1 s, 1 s, 2 s."""
    recipe = tiny_recipe()
    built = one_process(recipe)
    world = World(RankInfo(0, 0, 1, 1, "127.0.0.1", 0, "none"), prepare_device(0), built.groups, {})
    ours, bare = Measured(ENGINE, 100, [1.0, 2.0, 4.0]), Measured(BARE, 100, [1.0, 1.0, 2.0])
    plain = Measured(PLAIN, 200, [1.0, 1.0, 2.0])
    assert ours.tokens_per_s == 50.0
    assert plain.tokens_per_s == 200.0
    assert ours.ratio_to(plain) == 0.25  # 100/200, 50/200, 25/100: the median round
    result = report(recipe, world, [ours, bare, plain, Measured(HUGGING_FACE, 200)])
    assert result["did_not_fit"] == [HUGGING_FACE] and [row["name"] for row in result["rows"]] == [ENGINE, BARE, PLAIN]
    assert result["engine_overhead"] == 1.0  # each of two rounds in three took twice as long
    row = result["rows"][0]
    assert row["ratio"] == 0.25
    assert row["mfu"] == pytest.approx(50.0 * flops_per_token(recipe.model, 250) / (result["peak_tflops"] * 1e12))
    assert dataclasses.asdict(built.groups.layout) == result["ranks"]
