"""The training row of `metrics.jsonl`: what was measured, and the rates that follow from it."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What turns tokens per second into FLOP/s and MFU.

    flops_per_token: of a training step of the whole model; devices: ranks that share this work; peak_flops: FLOP/s of one
    device at the run's precision, None where unknown; planned: columns that every row ends with, what a plan predicted.
    """

    flops_per_token: float
    devices: int
    peak_flops: float | None = None
    planned: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMetrics:
    """One training row as measured, over the whole global batch.

    samples, tokens: consumed since the run began; loss: nats a token, None on a step that has none; lr: of this step;
    grad_norm: before clipping, after unscaling; loss_scale: of fp16, else None; skipped: steps skipped for overflow since the
    run began; step_time_s, step_tokens: mean duration and tokens of the steps since the last row; memory_gib: highest of the ranks.
    """

    step: int
    samples: int
    tokens: int
    loss: float | None
    lr: float
    grad_norm: float | None
    loss_scale: float | None
    skipped: int
    step_time_s: float
    step_tokens: float
    memory_gib: float

    def row(self, machine: Machine) -> dict[str, float | int | None]:
        """The row, in the order of its columns."""
        tokens_per_s = self.step_tokens / self.step_time_s if self.step_time_s > 0 else 0.0
        flops_per_device = tokens_per_s * machine.flops_per_token / machine.devices
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "loss": self.loss,
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "loss_scale": self.loss_scale,
            "skipped": self.skipped,
            "step_time_s": self.step_time_s,
            "tokens_per_s": tokens_per_s,
            "tflops_per_device": flops_per_device / 1e12,
            "mfu": flops_per_device / machine.peak_flops if machine.peak_flops else None,
            "memory_gib": self.memory_gib,
            **machine.planned,
        }


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far, in GiB: on a GPU the allocator's tensors, else resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    return peak_resident_bytes() / GIB


def peak_resident_bytes() -> int:
    """Highest resident memory of this process.

    VmHWM belongs to the program now running; getrusage's maximum also remembers the program that started it, which would make
    every rank look as large as its launcher. So getrusage serves only where there is no /proc.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
