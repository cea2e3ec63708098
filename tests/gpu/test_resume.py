"""Save and go on with the GPU's own kernels: fused Adam keeps its step counts on the device, offloaded moments do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from largeformer.checkpoint.commit import committed
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state
from largeformer.training.saving import save_checkpoint
from tests.gpu.runs import assert_alike, engine_on, recipe_of, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("config", ["zero1", "zero2", "zero3", "zero2_offload_cpu", "zero3_offload_cpu"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_goes_on_where_it_was_saved(device: torch.device, tmp_path: Path, config: str, precision: str) -> None:
    recipe = recipe_of(precision, config, initial_loss_scale_power=10)
    with engine_on(device, recipe) as bench:
        before = [step(bench, device, seed) for seed in range(3)]
        save_checkpoint(tmp_path, bench.engine, TrainingState(Progress(step=3)), "")
        expected = [step(bench, device, seed) for seed in range(3, 6)]
    (checkpoint,) = committed(tmp_path)
    with engine_on(device, recipe, weights_from=checkpoint) as bench:
        state = load_training_state(checkpoint, bench.engine)
        after = [step(bench, device, seed) for seed in range(3, 6)]
    assert state.progress.step == 3
    # A step from forgotten moments would differ at once: the first steps of Adam are the largest.
    assert_alike(after, expected, 1e-5)
    assert not any(result.skipped for result in before)
