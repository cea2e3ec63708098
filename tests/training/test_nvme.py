"""Offload to NVMe by the shipped DeepSpeed config: the run is that of one process, and what it needs is really in the swap files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from largeformer.config.schema import Recipe
from largeformer.planning.kernels import libaio_links
from largeformer.training.engine import StepResult
from tests.distributed import RankContext, RankPool
from tests.recipes import tiny_recipe
from tests.training.engines import Tensors, assert_same, bench_of, global_batch

pytestmark = pytest.mark.slow

Ranks = Callable[[int], RankPool]
BUILD_S, CASE_S = 1800.0, 600.0
LR, STEPS = 1.0e-2, 3
RANKS = 2
TOLERANCE = 1e-4  # DeepSpeed's CPU Adam rounds otherwise than PyTorch's

# What is swapped, and its files below the run's folder.
FILES = {
    "parameters": "nvme_swap/zero_stage_3/float32params/rank*/*_param.tensor.swp",
    "masters": "nvme_swap/zero_stage_3/optimizer/rank*/[0-9]*[0-9].tensor.swp",
    "first moments": "nvme_swap/zero_stage_3/optimizer/rank*/exp_avg-*.swp",
    "second moments": "nvme_swap/zero_stage_3/optimizer/rank*/exp_avg_sq-*.swp",
}


def recipe_of(folder: Path, config: str) -> Recipe:
    """Matrices of which half, a rank's part, is above the mebibyte below which DeepSpeed swaps nothing."""
    return tiny_recipe(
        run={"output_dir": str(folder)},
        model={"num_layers": 2, "hidden_size": 512, "ffn_hidden_size": 1408, "init_method_std": 0.05},
        tokenizer={"vocab_size": 2000},
        train={"micro_batch_size": 2, "global_batch_size": 8},
        optimizer={"type": "adamw", "lr": LR, "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1.0e-5},
        deepspeed=f"ds_configs/{config}.json",
    )


def build_async_io(ranks: RankContext) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    AsyncIOBuilder().load(verbose=False)


@pytest.fixture(scope="module")
def aio(ranks: Ranks) -> None:
    """DeepSpeed's asynchronous I/O, compiled by one process before several want it: the others would wait for its lock."""
    if not libaio_links(os.environ):
        pytest.skip("libaio's headers are not here: apt-get install libaio-dev")
    ranks(1).run(build_async_io, timeout=BUILD_S)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An output folder; the swap files, 150 MB of them, do not outlive the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@dataclass(frozen=True)
class Run:
    results: list[StepResult]
    weights: Tensors


def train(ranks: RankContext, recipe: Recipe, wiped: str | None = None) -> Run:
    """Some steps, each of its own batch. Before the second, the files of the kind `wiped` are filled with zeros."""
    with bench_of(ranks, recipe) as bench:
        results = []
        for number in range(STEPS):
            if number == 1 and wiped is not None:
                wipe(ranks, recipe, wiped)
            results.append(bench.engine.train_step(bench.share(global_batch(recipe, seed=number)), LR))
        return Run(results, bench.weights())


def wipe(ranks: RankContext, recipe: Recipe, kind: str) -> None:
    files = [path for path in Path(recipe.run.output_dir).glob(FILES[kind]) if "gradient" not in path.name]
    assert {path.parent.name for path in files} == {f"rank{rank}" for rank in range(ranks.world_size)}, f"no {kind} were swapped"
    dist.barrier()
    if ranks.rank == 0:
        for path in files:
            path.write_bytes(bytes(path.stat().st_size))
    dist.barrier()


@pytest.fixture(scope="module")
def one_process(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same steps without ZeRO, by PyTorch's AdamW."""
    run: Run = ranks(1).run(train, recipe_of(tmp_path_factory.mktemp("one"), "zero0"), timeout=CASE_S)[0]
    return run


def numbers(run: Run) -> dict[str, list[Any]]:
    return {"loss": [result.loss for result in run.results], "norm": [result.grad_norm for result in run.results]}


def test_equals_one_process(aio: None, ranks: Ranks, one_process: Run, folder: Path) -> None:
    run = ranks(RANKS).run(train, recipe_of(folder, "zero3_offload_nvme"), timeout=CASE_S)[0]
    assert numbers(run) == {name: pytest.approx(values, rel=TOLERANCE) for name, values in numbers(one_process).items()}
    assert_same(run.weights, one_process.weights, TOLERANCE)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_swapped_is_read_again(aio: None, ranks: Ranks, one_process: Run, folder: Path, kind: str) -> None:
    """Without the files' contents the same steps lead elsewhere, so that memory held no second copy."""
    run = ranks(RANKS).run(train, recipe_of(folder, "zero3_offload_nvme"), kind, timeout=CASE_S)[0]
    assert run.results[0].loss == pytest.approx(one_process.results[0].loss, rel=TOLERANCE), "nothing was wiped yet"
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(run.weights, one_process.weights, 100 * TOLERANCE)
