"""The one table of names: what a column of `metrics.jsonl` is called in charts, and which events call somebody."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

STEP = "step"
TOKENS = "train/tokens"
"""The two axes that a chart may be drawn over."""

CHARTS: Mapping[str, str] = MappingProxyType(
    {
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "train/grad_norm",
        "loss_scale": "train/loss_scale",
        "skipped": "train/skipped",
        "samples": "train/samples",
        "tokens": TOKENS,
        "val_loss": "val/loss",
        "val_bits_per_byte": "val/bits_per_byte",
        "tokens_per_s": "perf/tokens_per_s",
        "step_time_s": "perf/step_time_s",
        "tflops_per_device": "perf/tflops_per_device",
        "mfu": "perf/mfu",
        "memory_gib": "memory/peak_gib",
    }
)
"""Column -> name of its chart."""

_GROUPS = ("train", "val", "perf", "memory", "plan")

ALERTS: Mapping[str, str] = MappingProxyType(
    {
        "nonfinite": "ERROR",
        "spike": "WARN",
        "rewound": "WARN",
        "stalled": "ERROR",
        "replica differs": "ERROR",
        "cut short": "WARN",
        "straggler": "WARN",
        "checkpoint failed": "ERROR",
        "checkpoint damaged": "WARN",
    }
)
"""Kind of event -> level of the alert that W&B sends to whoever asked for it. What is not here is the ordinary course of a run."""


def chart_name(column: str) -> str:
    """`val_loss` -> `val/loss`. A column that the table lacks is charted in the group that it names (`plan/...`, `plan_...`), else
    under `train/`."""
    if column in CHARTS:
        return CHARTS[column]
    for group in _GROUPS:
        if column.startswith((f"{group}/", f"{group}_")):
            return f"{group}/{column[len(group) + 1 :]}"
    return f"train/{column}"
