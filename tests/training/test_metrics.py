"""The training row: its columns, the arithmetic of its rates, and memory against the kernel's own figures."""

from __future__ import annotations

import mmap
import resource
import subprocess
import sys

import pytest
import torch

from largeformer.training.metrics import GIB, Machine, StepMetrics, peak_memory_gib

# As DESIGN.md lists them.
COLUMNS = [
    "step",
    "samples",
    "tokens",
    "loss",
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped",
    "step_time_s",
    "tokens_per_s",
    "tflops_per_device",
    "mfu",
    "memory_gib",
]

MEASURED = StepMetrics(
    step=7,
    samples=112,
    tokens=28672,
    loss=6.123456789012345,
    lr=3e-3,
    grad_norm=1.5,
    loss_scale=None,
    skipped=0,
    step_time_s=0.5,
    step_tokens=4096,
    memory_gib=1.25,
)


def test_the_row_has_the_promised_columns_and_keeps_what_was_measured() -> None:
    row = MEASURED.row(Machine(flops_per_token=6e9, devices=4, peak_flops=100e12))
    assert list(row) == COLUMNS
    assert (row["step"], row["loss"], row["loss_scale"], row["memory_gib"]) == (7, 6.123456789012345, None, 1.25)


def test_rates() -> None:
    row = MEASURED.row(Machine(flops_per_token=6e9, devices=4, peak_flops=100e12))
    # 4096 tokens in half a second; 8192 x 6 GFLOP = 49.152 TFLOP/s over four devices of 100 TFLOP/s
    assert row["tokens_per_s"] == 8192
    assert row["tflops_per_device"] == pytest.approx(12.288)
    assert row["mfu"] == pytest.approx(0.12288)


def test_an_unknown_peak_gives_no_mfu() -> None:
    assert MEASURED.row(Machine(flops_per_token=6e9, devices=1))["mfu"] is None


def test_memory_on_cpu_grows_by_what_is_touched() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    room = 256 * 2**20 + resource.getpagesize()
    # Enough to pass the peak so far, every page touched.
    with mmap.mmap(-1, int(before * GIB) - _resident_now() + room) as block:
        for offset in range(0, len(block), resource.getpagesize()):
            block[offset] = 1
        after = peak_memory_gib(torch.device("cpu"))
    assert 0.2 < after - before < 0.4


def test_memory_on_cpu_is_not_that_of_the_process_that_started_it() -> None:
    """The parent is large (torch); the child imports none of it, and must not inherit the parent's peak."""
    code = "from largeformer.training.metrics import peak_resident_bytes; print(peak_resident_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert child / GIB < 0.1 < peak_memory_gib(torch.device("cpu"))


def _resident_now() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
