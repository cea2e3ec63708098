"""Short trainings on one device: large enough for the kernels that real models use, small enough for seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.training.engine import StepResult
from tests.distributed import RankContext
from tests.recipes import tiny_recipe
from tests.training.engines import Bench, bench_of, global_batch

ALONE = RankContext(rank=0, world_size=1)
TOLERANCE = 2e-2  # of the loss and the gradient norm, from one precision to another: what 8 bits allow
MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "seq_length": 128,
    "init_method_std": 0.05,
}


def recipe_of(precision: str, deepspeed: str | None = None, *, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """A Llama of 3 million parameters with heads of 64, AdamW, two micro batches a step. ZeRO 1, for fp32 ZeRO 0, if not said."""
    return tiny_recipe(
        model={**MODEL, **(model or {})},
        tokenizer={"vocab_size": 1000},
        train={"precision": precision, "micro_batch_size": 4, "global_batch_size": 8, "loss_chunk_size": 96, **train},
        optimizer={"type": "adamw", "lr": 1.0e-3, "weight_decay": 0.1, "clip_grad": 1.0},
        deepspeed=f"ds_configs/{deepspeed or ('zero0' if precision == 'fp32' else 'zero1')}.json",
    )


@contextlib.contextmanager
def engine_on(device: torch.device, recipe: Recipe, weights_from: Path | None = None) -> Iterator[Bench]:
    """The recipe's engine, with initial weights or a checkpoint's. On a CPU, fp16 is allowed: PyTorch computes it there, slowly, and
    DeepSpeed would not ask for it."""
    from deepspeed.accelerator import get_accelerator

    allowed = contextlib.nullcontext()
    if device.type == "cpu":
        allowed = mock.patch.object(get_accelerator(), "is_fp16_supported", return_value=True)
    with allowed, bench_of(ALONE, recipe, weights_from) as bench:
        yield bench


def step(bench: Bench, device: torch.device, seed: int) -> StepResult:
    """One step of global batch number `seed`, at the recipe's learning rate."""
    batches = [batch.to(device) for batch in bench.share(global_batch(bench.recipe, seed=seed))]
    return bench.engine.train_step(batches, bench.recipe.optimizer.lr)


def trained(device: torch.device, recipe: Recipe, steps: int = 6) -> list[StepResult]:
    """The results of `steps` steps, each of its own batch."""
    with engine_on(device, recipe) as bench:
        return [step(bench, device, seed) for seed in range(steps)]


def assert_alike(ours: Sequence[StepResult], theirs: Sequence[StepResult], tolerance: float) -> None:
    """Loss and gradient norm of each step within `tolerance` of the other's, and none skipped."""
    assert not any(result.skipped for result in (*ours, *theirs))
    assert [result.loss for result in ours] == pytest.approx([result.loss for result in theirs], rel=tolerance)
    assert [result.grad_norm for result in ours] == pytest.approx([result.grad_norm for result in theirs], rel=tolerance)
