"""A rank is killed (SIGKILL) at any moment of saving: what was committed is found and can be read, whatever else lies there.

The moments are operations on files: opening, writing, renaming, deleting. A run that is let go counts them; then each case kills one rank
at one of them, drawn by chance. Ranks are forked from a process that has imported everything, so that a case takes a second or two.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from largeformer.checkpoint.commit import step_of, tidy
from largeformer.checkpoint.format import ShardWriter
from largeformer.checkpoint.retention import Policy
from largeformer.checkpoint.verify import find
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.config.schema import Recipe
from largeformer.launching.local import free_port, rank_environ
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state
from largeformer.training.saving import Checkpoints
from tests.distributed import RankContext, RankPool, forking
from tests.training.engines import bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
STEPS, RANKS = 5, 2
FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
QUICK, ALL = 5, 20
TIMEOUT = 150.0


def recipe_of() -> Recipe:
    return sgd_recipe(train={"micro_batch_size": 2}, optimizer={"type": "adamw", "lr": 1e-2}, deepspeed="ds_configs/zero1.json")


class Fuse:
    """Counts operations on files below `folder`, and kills its process at number `at`."""

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.count = str(folder), at, 0
        self.burning = False

    def tick(self) -> None:
        if self.burning:
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_OPERATIONS and any(self.folder in str(argument) for argument in arguments):
            self.tick()


class Told:
    """A tracker that puts down each step that a run was told is saved."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def event(self, kind: str, step: int, **fields: Any) -> None:
        if kind == "saved":
            self._path.write_text(str(step))

    def log(self, row: Any) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def close(self, status: str) -> None: ...


def save_many(rank: int, run: Path, async_save: bool, victim: int, at: int | None) -> None:
    """Five steps, each saved, of which two are kept. From the second on, `victim` is killed at operation `at`."""
    os.environ.update(rank_environ(os.environ, rank, RANKS, free_port()))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{run}/store", rank=rank, world_size=RANKS)
    folder = run / "checkpoints"
    fuse = Fuse(folder, at if rank == victim else None)
    sys.addaudithook(fuse.audit)
    write = ShardWriter._write

    def ticking(self: ShardWriter, data: memoryview) -> None:
        fuse.tick()
        write(self, data)

    ShardWriter._write = ticking  # type: ignore[method-assign]
    with bench_of(RankContext(rank, RANKS), recipe_of()) as bench:
        settings = CheckpointConfig(async_save=async_save)
        checkpoints = Checkpoints(folder, bench.engine, Told(run / f"told{rank}"), "", settings, Policy(keep_last=2))
        for step in range(1, STEPS + 1):
            bench.engine.train_step(bench.share(global_batch(bench.recipe, step)), 1e-2)
            checkpoints.poll()
            checkpoints.save(TrainingState(Progress(step=step)))
            if step == 1:
                checkpoints._complete()  # there is one to be found, whatever comes
                fuse.burning = True
        checkpoints.finish()
    (run / f"count{rank}").write_text(str(fuse.count))


def run_ranks(run: Path, async_save: bool, victim: int = 0, at: int | None = None) -> list[int | None]:
    """Both ranks' exit codes. The one that is not killed sees the other gone and ends by itself."""
    run.mkdir()
    context = forking()
    processes = [context.Process(target=save_many, args=(rank, run, async_save, victim, at)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[int]]:
    """By kind of save: how many operations each rank does after the first checkpoint."""
    counts = {}
    for async_save in (False, True):
        run = tmp_path_factory.mktemp("counted") / "run"
        assert run_ranks(run, async_save) == [0, 0]
        counts[async_save] = [int((run / f"count{rank}").read_text()) for rank in range(RANKS)]
        assert min(counts[async_save]) > 10
    return counts


def resume(ranks: RankContext, folder: Path) -> tuple[int, int, list[str]]:
    """As a run does, at another layout: step of the checkpoint, the step that its state says, what was refused."""
    tidy(folder)
    found = find(folder)
    with bench_of(ranks, recipe_of(), weights_from=found.checkpoint) as bench:
        state = load_training_state(found.checkpoint, bench.engine)
    return step_of(found.checkpoint), state.progress.step, [str(refused) for refused in found.refused]


@pytest.mark.parametrize("number", [*range(QUICK), *(pytest.param(number, marks=pytest.mark.slow) for number in range(QUICK, ALL))])
def test_what_was_committed_is_found(ranks: Ranks, operations: dict[bool, list[int]], tmp_path: Path, number: int) -> None:
    chance = random.Random(number)
    async_save, victim = number % 2 == 1, chance.randrange(RANKS)
    at = chance.randint(1, operations[async_save][victim] - 1)
    codes = run_ranks(tmp_path / "run", async_save, victim, at)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] is not None, "the other rank ends, and does not wait for the dead"
    told = max((int(path.read_text()) for path in (tmp_path / "run").glob("told*")), default=1)
    found, step, refused = ranks(1).run(resume, tmp_path / "run" / "checkpoints")[0]
    assert refused == [] and step == found
    assert found >= told >= 1
    assert codes[1 - victim] != 0 or found == STEPS, "it can only have ended well where the last step had been committed"
