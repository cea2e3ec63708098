"""Published runs: whether they are planned as fitting, known failures as not, and how far planned speeds are from measured ones."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from largeformer.planning.hardware import cluster_of
from largeformer.planning.memory import rank_memory
from largeformer.planning.prediction import misfits
from largeformer.planning.step import step_time
from tests.planning.published import CORE, FULL, HELD_OUT, RUNS, TITAN_H100, Run

UNSTATED = ""
MLP = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}


def megatron(model: str, gpus: int, pipeline: int, batch: int, virtual: int | None = None) -> Run:
    """Narayanan et al. 2021, arXiv:2104.04473, table 1: tensor parallel 8, everything recomputed."""
    return Run(model, "a100", gpus, 0.0, UNSTATED, batch, tensor=8, pipeline=pipeline, virtual=virtual, train=FULL)


# What its source says ran.
FITS: dict[str, Run] = {
    **{run.name: run for run in RUNS},
    "Megatron-LM 530B, 2520 A100": megatron("GPT 530B", 2520, 35, 2520),
    "Megatron-LM 1T, 3072 A100": megatron("GPT 1T", 3072, 64, 3072),
    "torchtitan Llama 3 8B, 8 H100, two sequences, some recomputed": Run("Llama 3 8B", "h100", 8, 0.0, UNSTATED, 16, 2, zero=3, train=MLP),
    "torchtitan Llama 3 8B, 8 H100, two sequences, recomputed": Run("Llama 3 8B", "h100", 8, 0.0, UNSTATED, 16, 2, zero=3, train=FULL),
    "torchtitan Llama 3 8B, 128 H100": Run("Llama 3 8B", "h100", 128, 0.0, UNSTATED, 256, 2, zero=3, train=FULL),
    "torchtitan Llama 3 8B, 64 A100": Run("Llama 3 8B", "a100", 64, 0.0, UNSTATED, 64, zero=3, train=MLP),
    "Llama 3 70B, TP8 PP4, 256 H100": Run(
        "Llama 3 70B", "h100", 256, 0.0, UNSTATED, 256, tensor=8, pipeline=4, virtual=5, sequence_parallel=True, train=CORE
    ),
}

# What was reported to run out of memory, and where.
FAILS: dict[str, Run] = {
    # torchtitan, docs/performance.md: "405B ... we do see OOM for 1D parallelism", 128 H100, two sequences, full recomputation.
    "405B, ZeRO 3 over 128 H100": Run("Llama 3 405B", "h100", 128, 0.0, UNSTATED, 256, 2, zero=3, train=FULL),
    # The same, on Llama 2 70B with two sequences and less than full recomputation, 64 A100.
    "70B, ZeRO 3 over 64 A100, two sequences": Run("Llama 2 70B", "a100", 64, 0.0, UNSTATED, 128, 2, zero=3),
    # tatsu-lab/stanford_alpaca#220 and young-geng/EasyLM#87: all weights of a 7B on one A100.
    "7B on one A100": Run("MPT 7B", "a100", 1, 0.0, UNSTATED, 1, seq_length=512),
    # Alpha-VLLM/LLaMA2-Accessory#26: all weights of a 13B on two A800.
    "13B, ZeRO 3 over two A100": Run("Llama 2 13B", "a100", 2, 0.0, UNSTATED, 2, zero=3, seq_length=512, train=FULL),
}

# Fitted where they ran, with layers that a compiler had fused: largeformer's keep more of an unfused SwiGLU.
FUSED = {"Llama 2 13B, 64 x a100, ZeRO 3"}


@pytest.mark.parametrize("name", sorted(FITS.keys() - FUSED))
def test_what_ran_fits(name: str) -> None:
    """Once it trains: those who ran it under ZeRO 3 part the weights while the model is built."""
    run = FITS[name]
    plan = run.recipe.plan
    if run.source == TITAN_H100:  # those H100 have 96 GB
        plan = plan.model_copy(update={"memory_gib": 94.0})
    assert misfits(cluster_of(plan), [replace(row, start_bytes=0) for row in rank_memory(run.job)]) == []


def test_the_whole_part_of_a_rank_must_fit_before_zero_3_has_parted_it() -> None:
    run = FITS["Llama 3 70B, 64 x a100, ZeRO 3, recomputed"]
    (problem,) = misfits(cluster_of(run.recipe.plan), rank_memory(run.job))
    assert "before ZeRO 3 has parted the weights" in problem
    (row,) = rank_memory(run.job)
    assert row.total_bytes == row.start_bytes > 2 * row.parameters


@pytest.mark.parametrize("name", FAILS)
def test_what_ran_out_of_memory_does_not_fit(name: str) -> None:
    run = FAILS[name]
    assert misfits(run.cluster, rank_memory(run.job)) != []


def test_speeds_of_the_runs_that_nothing_was_fitted_to() -> None:
    """The aim is 30 %; docs/planning.md has every row."""
    errors = [abs(step_time(run.job).tokens_per_s / run.gpus / run.tokens_per_gpu_s - 1) for run in HELD_OUT]
    assert statistics.mean(errors) < 0.15
    assert max(errors) < 0.30
