"""`largeformer parity`: its verdict on two measurements, and the whole of it on processes of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from largeformer import cli
from largeformer.stages import parity
from largeformer.training.parity import Measurement
from tests.recipes import tiny_recipe


def measurement() -> Measurement:
    tensor = torch.arange(1.0, 65.0)
    return Measurement(2.5, 1.25, 2.25, {"weight": tensor, "bias": tensor + 1}, {"weight": 2 * tensor, "bias": 3 * tensor})


def moved(by: float) -> Callable[[Measurement], Measurement]:
    return lambda found: replace(found, gradients=found.gradients | {"weight": found.gradients["weight"] * (1 + by)})


# what the layout measured, made of what one process did -> exit code
MEASURED: dict[str, tuple[Callable[[Measurement], Measurement], int]] = {
    "the same": (lambda found: found, 0),
    "rounding": (moved(2e-5), 0),
    "a gradient off": (moved(2e-4), 1),
    "a gradient of one side only": (lambda found: replace(found, gradients={"weight": found.gradients["weight"]}), 1),
    "a value after the step off": (lambda found: replace(found, values=found.values | {"bias": found.values["bias"] * 1.001}), 1),
    "the loss off": (lambda found: replace(found, loss=found.loss + 1e-3), 1),
    "a norm that is none": (lambda found: replace(found, grad_norm=math.nan), 1),
}


@pytest.mark.parametrize("case", MEASURED)
def test_verdict(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str) -> None:
    layout, code = MEASURED[case]
    monkeypatch.setattr(parity, "_run_both", lambda recipe, nproc: (measurement(), layout(measurement())))
    assert parity.run(tiny_recipe(), 2) == code
    out = capsys.readouterr().out
    assert ("DIFFERENT" in out) == bool(code) and ("SAME" in out) != bool(code)


@pytest.mark.slow
def test_two_ranks_against_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In fp32 and in bf16, with a DeepSpeed config that names the precision and the clipping itself."""
    config = {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    (tmp_path / "own.json").write_text(json.dumps(config))
    small = ["model.num_layers=2", "model.hidden_size=64", "model.ffn_hidden_size=96", "model.seq_length=32", "tokenizer.vocab_size=250"]
    layout = ["parallel.tensor_model_parallel_size=2", "train.precision=bf16", f"deepspeed={tmp_path / 'own.json'}"]
    assert cli.main(["parity", "-c", "quickstart", "--nproc", "2", *small, *layout]) == 0
    out = capfd.readouterr().out
    assert out.count("SAME") == 2 and "fp32: tensor 2" in out and "bf16: tensor 2" in out
