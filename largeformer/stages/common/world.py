"""Entering the world that the launcher made: device, process groups, and what all ranks must agree on before work starts."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from largeformer.artifact import Status, read_status, write_status
from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.launching.local import free_port
from largeformer.parallel.environment import RankInfo, discover, to_environ
from largeformer.training.signals import StopRequested

if TYPE_CHECKING:
    import torch

    from largeformer.parallel.groups import ParallelGroups


_MAIN_SPEAKS_WITHIN_S = 3.0

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This rank, its device and its groups under the recipe's layout; `deepspeed` is the resolved config for it."""

    info: RankInfo
    device: torch.device
    groups: ParallelGroups
    deepspeed: dict[str, Any]

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank; the others wait. What it raises is raised on every rank."""
        from largeformer.parallel.agreement import from_main

        return from_main(work)

    def regroup(self, recipe: Recipe) -> World:
        """The same ranks under another layout."""
        from largeformer.parallel.groups import create_groups, destroy_groups

        destroy_groups()
        return replace(self, groups=create_groups(recipe.layout(self.info.world_size)))


def check_world(recipe: Recipe) -> None:
    """Raise BadInputError where recipe, DeepSpeed config, world and machine do not fit: before data is touched."""
    from largeformer.parallel.device import machine_problems
    from largeformer.tracking.wandb_login import login_problems
    from largeformer.training.engine import section_problems

    info = discover(os.environ)
    resolved = resolve_deepspeed(recipe, load_deepspeed(recipe), info.world_size)
    problems = (
        section_problems(resolved, recipe.deepspeed) + output_problems(recipe) + machine_problems(recipe.train.precision, info.local_rank)
    )
    if info.rank < info.local_world_size:  # rank 0 will ask for the key; its machine's ranks stop together
        problems += login_problems(recipe.tracking.wandb.mode)
    if problems:
        raise BadInputError(problems)


def output_problems(recipe: Recipe) -> list[str]:
    """A sentence where this process could not write into the output folder, or make it."""
    folder = Path(recipe.run.output_dir).absolute()
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return []
    return [f"run.output_dir {recipe.run.output_dir}: {there} is not a folder that may be written to; choose another"]


@contextlib.contextmanager
def enter_world(recipe: Recipe, *, training: bool = True) -> Iterator[World]:
    """Join the other ranks. Raises BadInputError, before anything heavy, where recipe, world and machine do not fit.

    Without `training` the DeepSpeed config is not read, and `deepspeed` of the world is empty.
    """
    info = discover(os.environ)
    recipe.layout(info.world_size)
    deepspeed = resolve_deepspeed(recipe, load_deepspeed(recipe), info.world_size) if training else {}
    if info.master_port == 0:
        info = replace(info, master_port=free_port())
    os.environ.update(to_environ(info))
    # DeepSpeed's kernel builds look for ninja on PATH; it lies beside this Python, whether or not the environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    from largeformer.parallel.cpu_products import products_for
    from largeformer.parallel.device import machine_problems, prepare_device, seed_ranks
    from largeformer.parallel.groups import create_groups, destroy_groups, join_world

    if problems := machine_problems(recipe.train.precision, info.local_rank):
        raise BadInputError(problems)
    device = prepare_device(info.local_rank, info.local_world_size)
    join_world(info.rank, info.world_size, f"tcp://{info.master_addr}:{info.master_port}", device)
    groups = create_groups(recipe.layout(info.world_size))
    at = groups.coordinates
    seed_ranks(recipe.run.seed, at.tensor, at.data, at.pipeline)
    try:
        with products_for(recipe.train.precision, device):
            yield World(info, device, groups, deepspeed)
    finally:
        destroy_groups()


@contextlib.contextmanager
def reporting(recipe: Recipe, stage: str) -> Iterator[Callable[[Status], None]]:
    """Keep `status.json` true while `stage` runs. The block may say that it ends as something else than finished; one that raises
    StopRequested was interrupted, and is to be started again."""
    folder = Path(recipe.run.output_dir)
    is_main = discover(os.environ).is_main
    ends: list[Status] = ["finished"]
    if is_main:
        write_status(folder, "running", stage=stage)
    try:
        yield ends.append
    except StopRequested as stop:
        if is_main:
            write_status(folder, "requeue", stage=stage, reason=str(stop))
        raise
    except BaseException as error:
        tell_failure(recipe, stage, f"{type(error).__name__}: {error}")
        raise
    if is_main:
        write_status(folder, ends[-1], stage=stage)


def tell_failure(recipe: Recipe, stage: str, error: str) -> None:
    """Write into `status.json` that `stage` failed. Rank 0 does; where it has not after a while, it is dead, and this rank
    does in its place."""
    folder, info = Path(recipe.run.output_dir), discover(os.environ)
    if not info.is_main:
        deadline = time.monotonic() + _MAIN_SPEAKS_WITHIN_S
        while time.monotonic() < deadline:
            if not _runs(folder, stage):
                return
            time.sleep(0.1)
        error = f"rank {info.rank}: {error}"
    write_status(folder, "failed", stage=stage, error=error)


def _runs(folder: Path, stage: str) -> bool:
    status = read_status(folder) or {}
    return status.get("status") == "running" and status.get("stage") == stage
