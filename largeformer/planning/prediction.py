"""One layout on one machine, predicted: does it fit, how long is a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largeformer.config.schema import Recipe
from largeformer.planning.hardware import GIB, Cluster
from largeformer.planning.inventory import inventories
from largeformer.planning.memory import RankMemory, fullest, rank_memory
from largeformer.planning.step import Job, StepTime, step_time


@dataclass(frozen=True)
class Prediction:
    """memory: a row for each pipeline stage."""

    job: Job
    memory: list[RankMemory]
    step: StepTime

    @property
    def fullest(self) -> RankMemory:
        return fullest(self.memory)

    @property
    def misfits(self) -> list[str]:
        """What does not fit, with the numbers; empty where all does."""
        return misfits(self.job.cluster, self.memory)


def job_of(recipe: Recipe, world_size: int, deepspeed: Mapping[str, Any], cluster: Cluster) -> Job:
    """`deepspeed`: resolved. Raises BadInputError where the degrees do not divide the world."""
    return Job(recipe, recipe.layout(world_size), deepspeed, cluster, inventories(recipe))


def predict(job: Job, exact: bool = True) -> Prediction:
    return Prediction(job, rank_memory(job), step_time(job, exact))


def misfits(cluster: Cluster, memory: list[RankMemory]) -> list[str]:
    row = fullest(memory)
    wrong = []
    have = cluster.gpu.memory_gib
    if row.total_bytes > have * GIB:
        when = ", before ZeRO 3 has parted the weights," if row.total_bytes == row.start_bytes else ""
        wrong.append(f"needs {row.total_bytes / GIB:.1f} GiB on stage {row.stage}{when} {cluster.gpu.name} has {have:g}")
    host = max(row.host_bytes for row in memory)
    if host > cluster.host_gib_per_gpu * GIB:
        wrong.append(f"needs {host / GIB:.1f} GiB of host memory a GPU, plan.host_gib_per_gpu is {cluster.host_gib_per_gpu:g}")
    return wrong
