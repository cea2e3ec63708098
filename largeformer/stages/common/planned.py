"""A run beside its plan: what was predicted goes into every row of the record, and by how much it was wrong into the manifest."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from largeformer.config.schema import Recipe
from largeformer.planning.hardware import GIB, PRESETS, Cluster, cluster_of
from largeformer.planning.prediction import job_of, predict
from largeformer.stages.common.world import World

_WARMUP_ROWS = 2  # of a process, whose first steps also compile, allocate and connect


def planned_columns(recipe: Recipe, world: World, peak_flops: float) -> dict[str, float]:
    """`plan_memory_gib`, `plan_step_time_s` of this run on the machine that it is on, whose peak is known. Compare with the columns
    `memory_gib` and `step_time_s`; on a GPU both memories are those of PyTorch's allocator, on a CPU of the process."""
    on_cpu = world.device.type == "cpu"
    job = job_of(recipe, world.info.world_size, world.deepspeed, _here(recipe, world, peak_flops))
    prediction = predict(job)
    most = prediction.fullest.total_bytes if on_cpu else max(row.allocated_bytes for row in prediction.memory)
    return {"plan_memory_gib": most / GIB, "plan_step_time_s": prediction.step.seconds}


def plan_errors(metrics: Path) -> dict[str, float]:
    """Predicted relative to measured, minus one, from a run's `metrics.jsonl`: the median of step times and the highest memory since
    the plan was last made. Empty where nothing was recorded."""
    rows = list(_planned_rows(metrics))
    if not rows:
        return {}
    last = rows[-1]
    same = [row for row in rows if row["plan_step_time_s"] == last["plan_step_time_s"]][_WARMUP_ROWS:] or [last]
    seconds, memory = statistics.median(row["step_time_s"] for row in same), max(row["memory_gib"] for row in same)
    return {
        "plan_memory_gib": last["plan_memory_gib"],
        "plan_memory_error": last["plan_memory_gib"] / memory - 1.0,
        "plan_step_time_s": last["plan_step_time_s"],
        "plan_step_time_error": last["plan_step_time_s"] / seconds - 1.0,
    }


def _planned_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        row = json.loads(line)
        if row.get("plan_step_time_s") and row.get("step_time_s") and row.get("memory_gib"):
            yield row


def _here(recipe: Recipe, world: World, peak_flops: float) -> Cluster:
    """The preset of this device, else of the recipe's `plan.gpu`, with the peak that was found."""
    import torch

    on_cpu = world.device.type == "cpu"
    name = "cpu" if on_cpu else _preset(torch.cuda.get_device_name(world.device)) or recipe.plan.gpu
    cluster = cluster_of(recipe.plan.model_copy(update={"gpu": name, "gpus_per_node": world.info.local_world_size}))
    tflops = peak_flops / 1e12
    return replace(cluster, gpu=replace(cluster.gpu, peak_tflops=tflops, fp32_tflops=tflops))


def _preset(device_name: str) -> str | None:
    return next((name for name in PRESETS if re.search(rf"\b{name}\b", device_name, re.IGNORECASE)), None)
