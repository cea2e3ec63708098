"""Run folders for the report, written by the trackers that write real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from largeformer.artifact import Artifact, write_status
from largeformer.tracking.jsonl import JsonlTracker, encode

HOSTILE = 'args):\n    </script><script>document.title = "taken"</script><img src=x onerror=alert(1)> &amp; \u2028'


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {"samples": 4 * step, "tokens": 128 * step, "loss": 2 + 6 * math.exp(-step / 50), "lr": 1e-3, "grad_norm": 1 + step % 3 / 8}
    return {"step": step, **values, "tokens_per_s": 1000.0, "memory_gib": 1.25, "skipped": 0, **changes}


def write_run(
    folder: Path, steps: int, name: str = "tiny", lr: float = 1e-3, changes: Mapping[int, Mapping[str, Any]] | None = None
) -> Path:
    """A run of three stages under `folder`; `changes` of the rows, by step. Validated every 50 steps, resumed at 60, one spike at 80."""
    stage = folder / "pretrain"
    tracker = JsonlTracker(stage, 0)
    for step in range(1, steps + 1):
        tracker.log(row(step, lr=lr, **(changes or {}).get(step, {})))
        if step % 50 == 0:
            tracker.log({"step": step, "val_loss": 3.0 - step / 1000, "val_bits_per_byte": 1.5})
            tracker.event("saved", step, checkpoint=f"step_{step:08d}")
    tracker.event("resumed", 60, checkpoint="step_00000050")
    tracker.event("spike", 80, z_score=12.5)
    tracker.sample(50, "def main(", HOSTILE)
    tracker.close("finished")
    (stage / "config.yaml").write_text(yaml.safe_dump({"run": {"name": name}, "optimizer": {"lr": lr, "betas": [0.9, 0.95]}}))
    Artifact("prepare", folder / "prepare", "a" * 16, metrics={"tokens": 5000}).write()
    Artifact("pretrain", stage, "b" * 16, {"prepare": "a" * 16}, {"val_loss": 2.5, "outcome": "finished"}).write()
    Artifact("evaluate", folder / "evaluate", "c" * 16, {"pretrain": "b" * 16}, {"loss": 2.25, "sample": "x = 1"}).write()
    write_status(folder, "finished")
    return folder


def write_long(stage: Path, steps: int, changes: Mapping[int, Mapping[str, Any]]) -> None:
    """`metrics.jsonl` alone, of many steps, in one go."""
    stage.mkdir(parents=True)
    with (stage / "metrics.jsonl").open("w") as lines:
        lines.writelines(encode(row(step, **changes.get(step, {}))) + "\n" for step in range(1, steps + 1))
