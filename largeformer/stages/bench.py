"""How fast a recipe trains here, beside the same model in a plain PyTorch loop. Random tokens; nothing is written.

The candidates take turns in one process, a few steps each, for several rounds, in another order every round: what the machine
does meanwhile hits all of them alike.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.bench_contenders import BARE, ENGINE, PLAIN, Candidate, Step, candidates
from largeformer.stages.common.world import World, enter_world

WARMUP_STEPS = 2
GIB = 2**30


@dataclass
class Measured:
    """One candidate's turns: `seconds` a step in each round. `memory_gib`: the most that its step held on the GPU, weights and
    optimizer included; None on a CPU, where the candidates' memory cannot be told apart. Without `seconds` it did not fit."""

    name: str
    tokens: int
    seconds: list[float] = field(default_factory=list)
    memory_gib: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    def ratio_to(self, other: Measured) -> float:
        """Speed as a multiple of the other's: the median over rounds, each round compared with itself."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(self.tokens / mine * theirs / other.tokens for mine, theirs in pairs)


def run(recipe: Recipe, nproc: int = 1, *, rounds: int = 5, steps: int = 4, as_json: bool = False) -> int:
    """Measure and print: a table, or one JSON object. Starts `nproc` ranks of this machine where no launcher has."""
    if nproc > 1 and discover(os.environ).world_size == 1:
        return _spawn(recipe, nproc, rounds, steps, as_json)
    with enter_world(recipe) as world:
        result = report(recipe, world, measure(recipe, world, rounds, steps))
        if world.info.is_main:
            print(json.dumps(result)) if as_json else _print_table(result)
    return 0


def measure(recipe: Recipe, world: World, rounds: int, steps: int, compiled: bool = True) -> list[Measured]:
    """Every candidate, in the order of the table. `compiled` False leaves out the compiled plain loop. Collective."""
    clock = _Clock(world)
    every: list[Measured] = []
    ready: list[tuple[Measured, Step, int]] = []
    for candidate in candidates(recipe, world, compiled):
        every.append(Measured(candidate.name, candidate.tokens))
        if (made := clock.warmed_up(candidate)) is not None:
            ready.append((every[-1], *made))
    if not ready:
        raise BadInputError("no candidate fits into this device's memory: lower train.micro_batch_size")
    for turn in range(rounds):
        first = turn % max(len(ready), 1)
        for measured, step, resident in ready[first:] + ready[:first]:
            if (timed := clock.time(step, steps)) is None:  # beside those that came later
                ready = [entry for entry in ready if entry[0] is not measured]
                measured.seconds.clear()
                continue
            seconds, peak = timed
            measured.seconds.append(seconds)
            if peak is not None:
                measured.memory_gib = max(measured.memory_gib or 0.0, (resident + peak) / GIB)
    return every


def report(recipe: Recipe, world: World, measured: Sequence[Measured]) -> dict[str, Any]:
    """The figures as one object. MFU counts the whole world's peak; `ratio` is to the plain eager loop."""
    from largeformer.models.flops import flops_per_token, parameter_count, peak_flops

    peak = peak_flops(recipe.train.precision, world.device)
    per_token = flops_per_token(recipe.model, recipe.tokenizer.vocab_size)
    by_name = {one.name: one for one in measured if one.seconds}
    rows = [
        {
            "name": one.name,
            "tokens_per_s": one.tokens_per_s,
            "mfu": one.tokens_per_s * per_token / (peak * world.info.world_size),
            "memory_gib": one.memory_gib,
            "ratio": one.ratio_to(by_name[PLAIN]) if PLAIN in by_name else None,
            "seconds_per_step": one.seconds,
        }
        for one in by_name.values()
    ]
    both = ENGINE in by_name and BARE in by_name
    return {
        "parameters": parameter_count(recipe.model, recipe.tokenizer.vocab_size),
        "precision": recipe.train.precision,
        "compile": recipe.train.compile,
        "peak_tflops": peak / 1e12,
        "ranks": asdict(world.groups.layout),
        "engine_overhead": 1.0 / by_name[ENGINE].ratio_to(by_name[BARE]) - 1.0 if both else None,
        "rows": rows,
        "did_not_fit": [one.name for one in measured if not one.seconds],
    }


class _Clock:
    """Times steps of all ranks together: from a barrier until the slowest has finished on its device."""

    def __init__(self, world: World) -> None:
        self._device = world.device
        self._on_gpu = world.device.type == "cuda"

    def warmed_up(self, candidate: Candidate) -> tuple[Step, int] | None:
        """Its step, after the first ones, and the GPU bytes that it keeps between steps; None where it does not fit in memory."""
        before = self._allocated()
        try:
            step = candidate.build()
            for _ in range(WARMUP_STEPS):
                step()
        except torch.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise  # the other ranks wait inside this candidate's step
            step = None
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
        if not self._all_ranks(step is not None):
            return None
        assert step is not None
        return step, self._allocated() - before

    def time(self, step: Step, steps: int) -> tuple[float, int | None] | None:
        """Seconds a step, and the GPU bytes held at the most beyond those at the start. None where it does not fit any more."""
        before = self._allocated()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        dist.barrier()
        self._synchronize()
        start = time.perf_counter()
        try:
            for _ in range(steps):
                step()
        except torch.OutOfMemoryError:
            if dist.get_world_size() > 1:
                raise
            gc.collect()
            torch.cuda.empty_cache()
            return None
        self._synchronize()
        elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=self._device)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        peak = torch.cuda.max_memory_allocated(self._device) - before if self._on_gpu else None
        return elapsed.item() / steps, peak

    def _all_ranks(self, mine: bool) -> bool:
        everyone = torch.tensor(float(mine), device=self._device)
        dist.all_reduce(everyone, dist.ReduceOp.MIN)
        return bool(everyone.item())

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._on_gpu else 0

    def _synchronize(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)


def _spawn(recipe: Recipe, nproc: int, rounds: int, steps: int, as_json: bool) -> int:
    from largeformer.config.load import recipe_yaml
    from largeformer.launching.local import spawn

    with tempfile.TemporaryDirectory(prefix="largeformer-bench-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(recipe_yaml(recipe))
        turns = ["--rounds", str(rounds), "--steps", str(steps), *(["--json"] if as_json else [])]
        return spawn(nproc, ["bench", "-c", str(path), "--nproc", str(nproc), *turns])


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "tokens/s", "MFU", "peak memory", f"x {PLAIN}", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result["rows"]:
        memory = "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f} GiB"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(row["name"], f"{row['tokens_per_s']:,.0f}", f"{row['mfu']:.1%}", memory, ratio)
    console = Console()
    how = "layers compiled" if result["compile"] else "layers not compiled (train.compile)"
    console.print(f"{result['parameters'] / 1e6:.1f}M parameters, {result['precision']}, {how}")
    console.print(f"MFU is against {result['peak_tflops']:.2f} TFLOP/s a device")
    console.print(table)
    for name in result["did_not_fit"]:
        console.print(f"{name} does not fit into this device's memory: lower train.micro_batch_size")
    if result["engine_overhead"] is not None:
        console.print(f"DeepSpeed engine against a bare optimizer: {result['engine_overhead']:+.1%} time a step")
