"""When a checkpoint is on disk, and what a failing disk costs: real engines, real ranks, a file system that is full.

`Checkpoints` is what `fit` holds. The disk is filled by a limit on the size of files, which every write meets as it would a full disk.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.checkpoint.commit import SaveError, committed, step_of
from largeformer.checkpoint.format import ShardWriter
from largeformer.checkpoint.retention import Policy
from largeformer.checkpoint.verify import checkpoint_problems
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.config.schema import Recipe
from largeformer.training import saving
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state
from largeformer.training.saving import Checkpoints, retention_policy
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2, Bench, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
MODES = {"synchronous": False, "asynchronous": True}


@dataclass
class Events:
    """A tracker that remembers."""

    told: list[tuple[str, int]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self.told.append((kind, step))
        self.reasons += [fields["reason"]] if "reason" in fields else []

    def log(self, row: Any) -> None: ...

    def sample(self, step: int, prompt: str, text: str) -> None: ...

    def close(self, status: str) -> None: ...


def recipe_of(zero: str = "zero1", **parallel: Any) -> Recipe:
    return sgd_recipe(
        model={"num_layers": 2},
        parallel=parallel,
        train={"micro_batch_size": 2},
        optimizer={"type": "adamw", "lr": 1e-2},
        deepspeed=f"ds_configs/{zero}.json",
    )


def checkpoints_of(bench: Bench, folder: Path, events: Events, async_save: bool, policy: Policy | None = None) -> Checkpoints:
    settings = CheckpointConfig(async_save=async_save)
    return Checkpoints(folder, bench.engine, events, "run: {}\n", settings, policy or Policy(keep_last=9))


def train(bench: Bench, step: int) -> TrainingState:
    bench.engine.train_step(bench.share(global_batch(bench.recipe, step)), 1e-2)
    return TrainingState(Progress(step=step, samples=8 * step))


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in committed(folder)]


@contextlib.contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file can grow beyond `limit` bytes: a write past it is refused with an error, as one to a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def save_on_a_full_disk(ranks: RankContext, folder: Path, async_save: bool, failing: int) -> tuple[Events, list[int], str, list[int]]:
    """Step 1 is saved; at step 2 the disk of one rank is full; step 3 is saved again. And a run that ends with a full disk."""
    events = Events()
    with bench_of(ranks, recipe_of()) as bench:
        checkpoints = checkpoints_of(bench, folder, events, async_save)
        checkpoints.save(train(bench, 1))
        checkpoints._complete()  # its thread writes before the disk is full
        state = train(bench, 2)
        with full_disk(30_000) if ranks.rank == failing else contextlib.nullcontext():
            checkpoints.save(state)
            checkpoints._complete()
            left = steps(folder)
        checkpoints.save(train(bench, 3))
        checkpoints._complete()
        with full_disk(30_000) if ranks.rank == failing else contextlib.nullcontext():
            checkpoints.save(train(bench, 4))
            with pytest.raises(SaveError) as caught:
                checkpoints.finish()
    return events, left, str(caught.value), steps(folder)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("async_save", MODES.values(), ids=MODES)
def test_a_full_disk_costs_one_checkpoint(ranks: Ranks, tmp_path: Path, async_save: bool, failing: int) -> None:
    for events, left, last, after in ranks(2).run(save_on_a_full_disk, tmp_path, async_save, failing):
        assert events.told == [("saved", 1), ("checkpoint failed", 2), ("saved", 3), ("checkpoint failed", 4)]
        assert left == [1] and after == [1, 3]
        assert all(f"rank {failing}: " in reason and "File too large" in reason for reason in (*events.reasons, last))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    assert [problem for step in (1, 3) for problem in checkpoint_problems(tmp_path / f"step_{step:08d}")] == []


def save_behind(ranks: RankContext, folder: Path) -> dict[str, Any]:
    """Rank 1's writing thread waits until it is let go. What there is to see meanwhile, and the state that was saved."""
    gate, write = threading.Event(), saving.write_contents
    events, seen = Events(), {}

    def write_when_let_go(*arguments: Any) -> Any:
        if ranks.rank == 1:
            assert gate.wait(60)
        return write(*arguments)

    saving.write_contents = write_when_let_go  # type: ignore[assignment]
    try:
        with bench_of(ranks, recipe_of()) as bench:
            checkpoints = checkpoints_of(bench, folder, events, async_save=True)
            state = train(bench, 1)
            expected = bench.weights(), bench.moments("exp_avg")
            checkpoints.save(state)
            for step in (2, 3):
                train(bench, step)
                checkpoints.poll()
                seen[f"told at {step}"] = list(events.told)
                seen[f"there at {step}"] = steps(folder)
            gate.set()
            checkpoints.finish()
            seen["in the end"] = steps(folder)
        with bench_of(ranks, recipe_of(), weights_from=folder / "step_00000001") as bench:
            seen["progress"] = load_training_state(folder / "step_00000001", bench.engine).progress
            loaded = bench.weights(), bench.moments("exp_avg")
            for ours, theirs in zip(loaded, expected, strict=True):
                assert_same(ours, theirs, 0)
    finally:
        saving.write_contents = write
    return {**seen, "told in the end": events.told}


def test_committed_at_the_step_at_which_all_ranks_are_through(ranks: Ranks, tmp_path: Path) -> None:
    """Meanwhile training changes weights and moments, and the checkpoint holds them as they were."""
    for seen in ranks(2).run(save_behind, tmp_path):
        assert (seen["told at 2"], seen["there at 2"]) == ([], [])
        assert (seen["told at 3"], seen["there at 3"]) == ([], [])
        assert (seen["told in the end"], seen["in the end"]) == ([("saved", 1)], [1])
        assert seen["progress"] == Progress(step=1, samples=8)


def poll_until_saved(ranks: RankContext, folder: Path) -> tuple[int, list[int]]:
    """How many steps later the first of two saves was told; then which are there."""
    events = Events()
    with bench_of(ranks, recipe_of()) as bench:
        checkpoints = checkpoints_of(bench, folder, events, async_save=True, policy=Policy(keep_last=1))
        checkpoints.save(train(bench, 1))
        polls = 0
        while not events.told:
            polls += 1
            checkpoints.poll()
        checkpoints.save(train(bench, 2))
        checkpoints.save(train(bench, 3))  # waits for the one under way
        checkpoints.finish()
    return polls, steps(folder)


def test_saves_follow_each_other_and_old_ones_go(ranks: Ranks, tmp_path: Path) -> None:
    polls, left = ranks(2).run(poll_until_saved, tmp_path)[0]
    assert polls >= 1 and left == [3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000003"]


def fail_in_the_thread(ranks: RankContext, folder: Path) -> tuple[list[str], str]:
    """Something that nobody foresaw, in one rank's thread."""
    events, write = Events(), saving.write_contents

    def broken(*arguments: Any) -> Any:
        raise MemoryError("no memory for a header") if ranks.rank == 1 else AssertionError

    if ranks.rank == 1:
        saving.write_contents = broken
    try:
        with bench_of(ranks, recipe_of()) as bench:
            checkpoints = checkpoints_of(bench, folder, events, async_save=True)
            checkpoints.save(train(bench, 1))
            with pytest.raises(SaveError) as caught:
                checkpoints.finish()
    finally:
        saving.write_contents = write
    return events.reasons, str(caught.value)


def test_an_error_in_a_thread_surfaces_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    for reasons, raised in ranks(2).run(fail_in_the_thread, tmp_path):
        assert reasons == [raised] and "rank 1: MemoryError: no memory for a header" in raised
    assert list(tmp_path.iterdir()) == []


def most_memory(ranks: RankContext, recipe: Recipe, folder: Path) -> dict[str, int]:
    """While a checkpoint is written: the most bytes of tensors alive that were made for it, the largest parameter, and all that was
    written. What is the optimizer's own memory was not made for it."""
    alive: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
    most, written = 0, 0
    append = ShardWriter.append
    with bench_of(ranks, recipe) as bench:
        state = train(bench, 1)
        own = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(bench)}

        def count(self: ShardWriter, tensor: torch.Tensor) -> None:
            nonlocal most, written
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.dtype != torch.uint8:  # random states are small, and at hand
                alive[storage.data_ptr()] = (weakref.ref(tensor), storage.nbytes())
            most = max(most, sum(size for reference, size in alive.values() if reference() is not None))
            written += tensor.nbytes
            append(self, tensor)

        ShardWriter.append = count  # type: ignore[method-assign]
        try:
            checkpoints_of(bench, folder, Events(), async_save=False).save(state)
        finally:
            ShardWriter.append = append  # type: ignore[method-assign]
        largest = max(4 * torch.Size(getattr(s.parameter, "ds_shape", s.parameter.shape)).numel() for s in bench.shards)
    return {"most": most, "largest": largest, "written": written}


def _tensors_of(bench: Bench) -> Iterator[torch.Tensor]:
    optimizer = bench.engine.wrapped.optimizer
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        yield from (value for value in state.values() if torch.is_tensor(value))
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        yield from getattr(optimizer, name, [])
    yield from (shard.parameter.data for shard in bench.shards)


LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "one process": (1, "zero0", {}),
    "DP2": (2, "zero0", {}),
    "DP2, ZeRO 1": (2, "zero1", {}),
    "DP2, ZeRO 2": (2, "zero2", {}),
    "DP2, ZeRO 3": (2, "zero3", {}),
    "TP2": (2, "zero0", TP2),
    "PP2": (2, "zero1", PP2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_parameter_in_memory_and_every_rank_writes_its_part(ranks: Ranks, tmp_path: Path, layout: str) -> None:
    world_size, zero, parallel = LAYOUTS[layout]
    counted = ranks(world_size).run(most_memory, recipe_of(zero, **parallel), tmp_path)
    for rank in counted:
        assert rank["most"] <= rank["largest"]
    shares = [rank["written"] / sum(other["written"] for other in counted) for rank in counted]
    assert all(share == pytest.approx(1 / world_size, abs=0.1) for share in shares), "no rank writes for the others"


def test_policy_follows_early_stopping() -> None:
    stopping = {"metric": "val_bits_per_byte", "mode": "max"}
    recipe = sgd_recipe(
        train={"early_stopping": stopping, "eval_interval": 5}, checkpoint={"keep_best": 2, "save_interval": 10, "keep_every": 40}
    )
    assert retention_policy(recipe) == Policy(3, 40, 2, "val_bits_per_byte", "max")
    assert retention_policy(sgd_recipe()) == Policy(3)
