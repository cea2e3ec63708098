"""What a run records of its plan."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from largeformer.planning.hardware import GIB
from largeformer.planning.prediction import job_of, predict
from largeformer.stages.common.planned import _here, _preset, plan_errors, planned_columns
from tests.recipes import tiny_recipe


def world(device: str = "cpu", ranks: int = 2) -> Any:
    info = SimpleNamespace(world_size=ranks, local_world_size=ranks)
    return SimpleNamespace(info=info, device=torch.device(device), deepspeed={"zero_optimization": {"stage": 1}})


def test_columns_are_the_plan_of_this_machine() -> None:
    recipe = tiny_recipe()
    columns = planned_columns(recipe, world(), peak_flops=2e11)
    cluster = _here(recipe, world(), 2e11)
    assert cluster.gpu.name == "cpu" and cluster.peak_flops("fp32") == cluster.peak_flops("bf16") == 2e11
    expected = predict(job_of(recipe, 2, world().deepspeed, cluster))
    assert columns == {"plan_memory_gib": expected.fullest.total_bytes / GIB, "plan_step_time_s": expected.step.seconds}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_preset_of_a_device(device: str, name: str | None) -> None:
    assert _preset(device) == name


def row(step: int, seconds: float, memory: float, planned: float) -> dict[str, float]:
    return {"step": step, "step_time_s": seconds, "memory_gib": memory, "plan_memory_gib": 3.0, "plan_step_time_s": planned}


@pytest.mark.parametrize(
    ("rows", "memory", "seconds"),
    [
        pytest.param(
            [row(1, 9.0, 1.0, 2.0), row(2, 7.0, 2.0, 2.0), row(3, 4.0, 2.5, 2.0), row(4, 4.0, 2.5, 2.0)],
            0.2,
            -0.5,
            id="warmup left out",
        ),
        pytest.param([row(1, 1.0, 6.0, 2.0)], -0.5, 1.0, id="one row"),
        pytest.param([row(1, 9.0, 9.0, 8.0), {"step": 1, "val_loss": 3.0}, row(2, 1.0, 6.0, 2.0)], -0.5, 1.0, id="planned anew"),
    ],
)
def test_errors(tmp_path: Path, rows: list[dict[str, float]], memory: float, seconds: float) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    errors = plan_errors(path)
    assert errors["plan_memory_error"] == pytest.approx(memory) and errors["plan_step_time_error"] == pytest.approx(seconds)


def test_a_run_without_rows_says_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert plan_errors(path) == {}
    path.write_text('{"step": 1, "val_loss": 2.0}\n')
    assert plan_errors(path) == {}
