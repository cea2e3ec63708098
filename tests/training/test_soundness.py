"""A NaN or an infinity on one rank, wherever it arises: every rank skips the step, and no digit of the state moves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.training.checkpointing import Progress
from largeformer.training.engine import StepResult
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2
from tests.training.engines import PP2, TP2, TP2_SP, Bench, Tensors, assert_same, bench_of, global_batch, sgd_recipe

Ranks = Callable[[int], RankPool]
TP2_PP2 = {**TP2, **PP2}

# world size, parallel section, DeepSpeed config, precision, keys of the model; then where the NaN is, and on which rank
CASES: dict[str, tuple[int, dict[str, Any], str, str, dict[str, Any], str, int]] = {
    "one process, ZeRO 0": (1, {}, "zero0", "fp32", {}, "gradient", 0),
    "one process, ZeRO 1": (1, {}, "zero1", "fp32", {}, "gradient", 0),
    "DP2, ZeRO 0": (2, {}, "zero0", "fp32", {}, "gradient", 1),
    "DP2, ZeRO 1": (2, {}, "zero1", "fp32", {}, "gradient", 1),
    "DP2, ZeRO 2": (2, {}, "zero2", "fp32", {}, "gradient", 1),
    "DP2, ZeRO 3": (2, {}, "zero3", "fp32", {}, "gradient", 1),
    "DP2, ZeRO 2, offload": (2, {}, "zero2_offload_cpu", "fp32", {}, "gradient", 1),
    "DP2, ZeRO 3, offload": (2, {}, "zero3_offload_cpu", "fp32", {}, "gradient", 0),
    "DP2, ZeRO 1, bf16": (2, {}, "zero1", "bf16", {}, "gradient", 1),
    "DP2, ZeRO 2, bf16": (2, {}, "zero2", "bf16", {}, "gradient", 1),
    "DP2, ZeRO 3, bf16": (2, {}, "zero3", "bf16", {}, "gradient", 0),
    "DP2, an infinity": (2, {}, "zero1", "fp32", {}, "infinity", 1),
    "DP2, activations": (2, {}, "zero1", "fp32", {}, "activation", 1),
    "first stage of PP2": (2, PP2, "zero1", "fp32", {}, "gradient", 0),
    "last stage of PP2": (2, PP2, "zero1", "fp32", {}, "gradient", 1),
    "first stage of PP2, ZeRO 0": (2, PP2, "zero0", "fp32", {}, "gradient", 0),
    "last stage of PP2, tied, bf16": (2, PP2, "zero1", "bf16", GPT2, "gradient", 1),
    "activations of the first stage of PP2": (2, PP2, "zero1", "fp32", {}, "activation", 0),
    "TP2, activations": (2, TP2, "zero1", "fp32", {}, "activation", 1),
    "TP2 SP": (2, TP2_SP, "zero1", "fp32", GPT2, "gradient", 1),
    "TP2, a shared parameter, ZeRO 0": (2, TP2, "zero0", "fp32", {}, "shared parameter", 1),
    "TP2, a shared parameter, ZeRO 1": (2, TP2, "zero1", "fp32", {}, "shared parameter", 1),
    "TP2, a shared parameter, ZeRO 3": (2, TP2, "zero3", "fp32", {}, "shared parameter", 1),
    "TP2, a shared parameter, bf16": (2, TP2, "zero1", "bf16", {}, "shared parameter", 1),
    "TP2, the loss alone, ZeRO 0": (2, TP2, "zero0", "fp32", {}, "loss", 1),
    "TP2, the loss alone, ZeRO 1": (2, TP2, "zero1", "fp32", {}, "loss", 1),
    "TP2, the loss alone, ZeRO 2": (2, TP2, "zero2", "fp32", {}, "loss", 1),
    "TP2, the loss alone, ZeRO 3": (2, TP2, "zero3", "fp32", {}, "loss", 1),
    "TP2, the loss alone, bf16": (2, TP2, "zero1", "bf16", {}, "loss", 1),
}
SLOW: dict[str, tuple[int, dict[str, Any], str, str, dict[str, Any], str, int]] = {
    f"TP2 x PP2, {what} on rank {rank}, {zero}": (4, TP2_PP2, zero, "fp32", {}, what, rank)
    for what in ("gradient", "shared parameter", "activation")
    for zero in ("zero0", "zero1")
    for rank in ((1, 3) if what == "shared parameter" else range(4))
}


@contextlib.contextmanager
def broken(bench: Bench, what: str, rank: int) -> Iterator[None]:
    """Within, `what` of `rank` is not finite in one place."""
    if bench.groups.rank != rank:
        yield
        return
    bad = math.inf if what == "infinity" else math.nan
    shared = [s.parameter for s in bench.shards if "norm" in s.name and not getattr(s.parameter, "tensor_model_parallel", False)]
    if what == "activation":
        handle = bench.engine.chunks[0].decoder.layers[0].register_forward_hook(lambda module, args, output: _spoiled(output, bad))
    elif what == "loss":
        accumulate = bench.engine.accumulate
        bench.engine.accumulate = lambda batches: _with_loss(accumulate(batches), bad)  # type: ignore[method-assign]
    else:
        parameter = shared[0] if what == "shared parameter" else bench.shards[0].parameter
        handle = parameter.register_hook(lambda gradient: gradient * torch.full_like(gradient, bad))
        # First of all hooks, as if the backward had made it. (PyTorch runs them in the order in which the mapping was filled.)
        hooks = parameter._backward_hooks
        others = [(number, hooks.pop(number)) for number in list(hooks) if number != handle.id]
        hooks.update(others)
    yield
    if what == "loss":
        del bench.engine.accumulate
    else:
        handle.remove()


def _spoiled(output: Any, bad: float) -> Any:
    hidden, *rest = output if isinstance(output, tuple) else (output,)
    spoiled = torch.cat([hidden[:1] * bad, hidden[1:]])
    return (spoiled, *rest) if isinstance(output, tuple) else spoiled


def _with_loss(accumulated: Any, loss: float) -> Any:
    return type(accumulated)(loss, accumulated.tokens, accumulated.loss_scale)


@dataclass(frozen=True)
class Run:
    results: list[StepResult]
    progress: Progress
    weights: Tensors
    moments: Tensors
    live: list[torch.Tensor]


def train(ranks: RankContext, recipe: Recipe, script: str, what: str, rank: int) -> Run:
    """A step for each letter: "." is good, "x" is not. Good step n is of batch n."""
    progress, results = Progress(), []
    with bench_of(ranks, recipe) as bench:
        for letter in script:
            batches = bench.share(global_batch(recipe, seed=progress.next_optimizer_step))
            with broken(bench, what, rank) if letter == "x" else contextlib.nullcontext():
                results.append(bench.engine.train_step(batches, 1e-2))
            progress = progress.after(results[-1], samples=0)
        live = [parameter.detach().clone() for chunk in bench.engine.chunks for parameter in chunk.parameters()]
        return Run(results, progress, bench.weights(), bench.moments("exp_avg"), live)


def check(ranks: Ranks, case: tuple[int, dict[str, Any], str, str, dict[str, Any], str, int]) -> None:
    world_size, parallel, zero, precision, model, what, rank = case
    recipe = sgd_recipe(
        model={"num_layers": 2, "init_method_std": 0.1, **model},
        parallel=parallel,
        train={"precision": precision, "micro_batch_size": 2, "train_iters": 8},
        optimizer={"type": "adamw", "lr": 1e-2, "clip_grad": 1.0, "backend": "torch"},
        deepspeed=f"ds_configs/{zero}.json",
    )
    runs: list[Run] = ranks(world_size).run(train, recipe, "x.x.", what, rank)
    smooth: list[Run] = ranks(world_size).run(train, recipe, "..", what, rank)
    for run, reference in zip(runs, smooth, strict=True):
        assert [result.skipped for result in run.results] == [True, False, True, False]
        assert [result.grad_norm is None for result in run.results] == [True, False, True, False]
        assert run.progress.next_optimizer_step == 3, "the schedule waits"
        assert [result.loss for result in run.results[1::2]] == [result.loss for result in reference.results]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run.live, reference.live, strict=True))
    assert_same(runs[0].weights, smooth[0].weights, 0)
    assert_same(runs[0].moments, smooth[0].moments, 0)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_skips_and_nothing_moves(ranks: Ranks, case: str) -> None:
    check(ranks, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_every_rank_skips_on_four(ranks: Ranks, case: str) -> None:
    check(ranks, SLOW[case])
