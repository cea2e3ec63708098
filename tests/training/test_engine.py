"""What an engine is built with, and what is refused before it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.config.schema import OptimizerConfig, Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common.world import check_world
from largeformer.training.optimizer import build_optimizer
from tests.distributed import RankContext, RankPool
from tests.recipes import tiny_recipe
from tests.training.engines import bench_of, sgd_recipe

# the section zero_optimization -> the optimizer that `auto` takes
OPTIMIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing said of offload": ({"stage": 1}, "AdamW"),
    "offload switched off": ({"stage": 1, "offload_optimizer": {"device": "none"}}, "AdamW"),
    "no device said": ({"stage": 1, "offload_optimizer": {"pin_memory": False}}, "AdamW"),
}


def kind_of_optimizer(ranks: RankContext, recipe: Recipe) -> str:
    with bench_of(ranks, recipe) as bench:
        return type(bench.engine.wrapped.optimizer.optimizer).__name__


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizer_of_auto(ranks: Callable[[int], RankPool], tmp_path: Path, case: str) -> None:
    zero, expected = OPTIMIZERS[case]
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    recipe = sgd_recipe(optimizer={"type": "adamw", "backend": "auto"}, deepspeed=str(tmp_path / "own.json"))
    assert ranks(1).run(kind_of_optimizer, recipe) == [expected]


def test_an_optimizer_of_the_cpu_wants_parameters_there() -> None:
    config = OptimizerConfig(lr=1e-3, backend="deepspeed_cpu")
    with pytest.raises(BadInputError, match="deepspeed_cpu updates on the CPU, and this model trains on a GPU"):
        build_optimizer(config, [torch.nn.Parameter(torch.ones(2, 2, device="meta"))], offloaded=False)


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "a word": (
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}},
        "zero_optimization.reduce_bucket_size is 'big'",
    ),
    "a negative size": ({"zero_optimization": {"stage": 2, "allgather_bucket_size": -5}}, "zero_optimization.allgather_bucket_size is -5"),
    "inside a section of a section": (
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "buffer_count": "many"}}},
        "zero_optimization.offload_param.buffer_count is 'many'",
    ),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_values_that_deepspeed_refuses_are_told_before_work_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str) -> None:
    config, told = WRONG_TYPES[case]
    (tmp_path / "own.json").write_text(json.dumps(config))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInputError, match="which DeepSpeed refuses") as refusal:
        check_world(tiny_recipe(deepspeed=str(tmp_path / "own.json"), run={"output_dir": str(tmp_path / "run")}))
    assert told in str(refusal.value) and "own.json" in str(refusal.value)
