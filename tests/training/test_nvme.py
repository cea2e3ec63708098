"""Offload to NVMe by the shipped DeepSpeed config: the run is that of one process, and what it needs is really in the swap files.

Three numbers of that config are there for this. DeepSpeed keeps `max_in_cpu` weights in memory, a billion unless told otherwise, so
that most models would swap none. And weights that stay gathered until they are used again, or are read ahead, hold on to one of five
buffers each: they run out where validation interrupts training.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from largeformer.checkpoint.commit import committed
from largeformer.config.schema import Recipe
from largeformer.planning.kernels import libaio_links
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state
from largeformer.training.saving import save_checkpoint
from tests.distributed import RankContext, RankPool
from tests.recipes import tiny_recipe
from tests.training.engines import Tensors, assert_same, bench_of, global_batch

pytestmark = pytest.mark.slow

Ranks = Callable[[int], RankPool]
BUILD_S, CASE_S = 1800.0, 600.0
LR, STEPS, RANKS = 1.0e-2, 4, 2
TOLERANCE = 1e-4  # DeepSpeed's CPU Adam rounds otherwise than PyTorch's
WHOLE = range(STEPS)

# What is swapped, and its files below the run's folder.
FILES = {
    "parameters": "nvme_swap/zero_stage_3/float32params/rank*/*_param.tensor.swp",
    "masters": "nvme_swap/zero_stage_3/optimizer/rank*/[0-9]*[0-9].tensor.swp",
    "first moments": "nvme_swap/zero_stage_3/optimizer/rank*/exp_avg-*.swp",
    "second moments": "nvme_swap/zero_stage_3/optimizer/rank*/exp_avg_sq-*.swp",
}


@dataclass(frozen=True)
class Run:
    """By step: the loss, the gradient norm, and the summed loss of an evaluation after it."""

    losses: list[float]
    norms: list[float | None]
    evaluations: list[float]
    weights: Tensors


def recipe_of(folder: Path, config: str = "zero3_offload_nvme") -> Recipe:
    """Matrices of which half, a rank's part, is above the mebibyte below which DeepSpeed swaps nothing."""
    return tiny_recipe(
        run={"output_dir": str(folder)},
        model={"num_layers": 2, "hidden_size": 512, "ffn_hidden_size": 1408, "init_method_std": 0.05},
        tokenizer={"vocab_size": 2000},
        train={"micro_batch_size": 2, "global_batch_size": 8},
        optimizer={"type": "adamw", "lr": LR, "weight_decay": 0.1, "clip_grad": 1.0, "eps": 1.0e-5},
        deepspeed=f"ds_configs/{config}.json",
    )


def train(ranks: RankContext, recipe: Recipe, steps: Sequence[int] = WHOLE, wiped: str | None = None) -> Run:
    """The given steps, each of its own batch: from the start, or from the checkpoint of an earlier call. Then a checkpoint. With
    `wiped` the files of that kind are filled with zeros before the second step."""
    folder = Path(recipe.run.output_dir) / "checkpoints"
    found = committed(folder) if steps[0] else []
    losses, norms, evaluations = [], [], []
    with bench_of(ranks, recipe, weights_from=found[-1] if found else None) as bench:
        if found:
            load_training_state(found[-1], bench.engine)
        for number in steps:
            if number == 1 and wiped is not None:
                wipe(ranks, recipe, wiped)
            batches = bench.share(global_batch(recipe, seed=number))
            result = bench.engine.train_step(batches, LR)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            evaluations.append(bench.engine.evaluate(batches)[0])
        save_checkpoint(folder, bench.engine, TrainingState(Progress(step=steps[-1] + 1)), "")
        return Run(losses, norms, evaluations, bench.weights())


def wipe(ranks: RankContext, recipe: Recipe, kind: str) -> None:
    files = [path for path in Path(recipe.run.output_dir).glob(FILES[kind]) if "gradient" not in path.name]
    assert {path.parent.name for path in files} == {f"rank{rank}" for rank in range(ranks.world_size)}, f"no {kind} were swapped"
    dist.barrier()
    if ranks.rank == 0:
        for path in files:
            path.write_bytes(bytes(path.stat().st_size))
    dist.barrier()


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


@pytest.fixture(scope="module")
def one_process(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same steps without ZeRO, by PyTorch's AdamW."""
    run: Run = ranks(1).run(train, recipe_of(tmp_path_factory.mktemp("one"), "zero0"), timeout=CASE_S)[0]
    return run


def numbers(run: Run) -> dict[str, list[Any]]:
    return {"losses": run.losses, "norms": run.norms, "evaluations": run.evaluations}


def test_equals_one_process(aio: None, ranks: Ranks, one_process: Run, folder: Path) -> None:
    run = ranks(RANKS).run(train, recipe_of(folder), timeout=CASE_S)[0]
    assert numbers(run) == {name: pytest.approx(values, rel=TOLERANCE) for name, values in numbers(one_process).items()}
    assert_same(run.weights, one_process.weights, TOLERANCE)


@pytest.mark.parametrize("kind", FILES)
def test_what_is_swapped_is_read_again(aio: None, ranks: Ranks, one_process: Run, folder: Path, kind: str) -> None:
    """Without the files' contents the same steps lead elsewhere: memory held no second copy."""
    run = ranks(RANKS).run(train, recipe_of(folder), WHOLE, kind, timeout=CASE_S)[0]
    assert run.losses[0] == pytest.approx(one_process.losses[0], rel=TOLERANCE), "nothing was wiped yet"
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(run.weights, one_process.weights, 100 * TOLERANCE)


def test_resumes_to_the_same_digits(aio: None, ranks: Ranks, folder: Path) -> None:
    whole = ranks(RANKS).run(train, recipe_of(folder / "whole"), timeout=CASE_S)[0]
    first, second = (ranks(RANKS).run(train, recipe_of(folder / "cut"), part, timeout=CASE_S)[0] for part in (WHOLE[:2], WHOLE[2:]))
    assert {name: [*numbers(first)[name], *numbers(second)[name]] for name in numbers(whole)} == numbers(whole)
    assert_same(second.weights, whole.weights, 0)
