"""What guards, watchdog and logging cost: `python -m tests.benchmarks.guards [rounds]`, some minutes on two cores.

One engine on two data-parallel ranks trains by turns of ten steps, with all that is on by default and without guards or trackers. The
medians over the turns are compared. Beside them stands the processor time that rank 0 spent inside guards and trackers, as a share of that
of its steps: it leaves out waiting for the other rank, which the step would have done elsewhere, and other work on the machine.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from largeformer.config.schema import Recipe
from largeformer.evaluation.perplexity import LossTotal
from largeformer.tracking.build import build_trackers
from largeformer.tracking.tracker import FanOut
from largeformer.training.early_stopping import EarlyStopping
from largeformer.training.guards import build_guards
from largeformer.training.metrics import Machine
from largeformer.training.schedule import LearningRateSchedule
from largeformer.training.trainer import Training, fit
from tests.distributed import RankContext, RankPool
from tests.recipes import tiny_recipe
from tests.training.engines import Bench, bench_of
from tests.training.test_trainer import Saved, Source

TURN = 10
SHAPE = {"num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 704, "num_attention_heads": 8, "num_query_groups": 4, "seq_length": 256}


class Nothing:
    """Guards that are not there."""

    watchdog = property(lambda self: self)
    spike = stop = None

    def step(self, step: int, first: bool) -> Any:
        return nullcontext()

    def suspended(self, what: str) -> Any:
        return nullcontext()

    def after_step(self, *args: Any) -> None: ...

    def interruption(self, minutes: float) -> None: ...


class Timed:
    """Anything, with the time spent inside its methods and their contexts' edges added up."""

    def __init__(self, inner: Any, spent: list[float]) -> None:
        self._inner, self._spent = inner, spent

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return Timed(value, self._spent) if name == "watchdog" else value

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            result = value(*args, **kwargs)
            if hasattr(result, "__enter__"):
                return self._edges(result)
            self._spent[0] += time.thread_time() - began
            return result

        return timed

    @contextmanager
    def _edges(self, inner: Any) -> Iterator[None]:
        began = time.thread_time()
        inner.__enter__()
        inside = time.thread_time()
        yield
        ended = time.thread_time()
        inner.__exit__(None, None, None)
        self._spent[0] += inside - began + time.thread_time() - ended


def compare(ranks: RankContext, recipe: Recipe, folder: Path, rounds: int) -> dict[str, float]:
    with bench_of(ranks, recipe) as bench:
        spent, processor = [0.0], 0.0
        tracker = build_trackers(recipe.tracking, folder, "guards", {}, 0, 10_000, enabled=ranks.rank == 0)
        on = build_guards(recipe, bench.engine, tracker, folder)
        source = Source(bench)
        turns: dict[str, list[float]] = {"off": [], "on": []}
        done = 0
        with on.watchdog:
            for round_ in range(rounds + 1):
                for name in ("off", "on") if round_ % 2 else ("on", "off"):
                    guards = Timed(on, spent) if name == "on" else Nothing()
                    training = _training(bench, recipe, source, guards, Timed(tracker, spent) if name == "on" else FanOut(), done)
                    before, worked = time.perf_counter(), time.process_time()
                    fit(training)
                    if round_:
                        turns[name].append(time.perf_counter() - before)
                        processor += time.process_time() - worked if name == "on" else 0.0
                    done += TURN
                if not round_:
                    spent[0] = 0.0
        tracker.close("finished")
    off, on_ = statistics.median(turns["off"]), statistics.median(turns["on"])
    return {
        "off": off / TURN,
        "on": on_ / TURN,
        "inside": spent[0] / rounds / TURN,
        "processor": processor / rounds / TURN,
        "pairs": statistics.median(b / a for a, b in zip(turns["off"], turns["on"], strict=True)),
    }


def _training(bench: Bench, recipe: Recipe, source: Source, guards: Any, tracker: Any, done: int) -> Training:
    from largeformer.training.checkpointing import Progress

    return Training(
        train=recipe.train.model_copy(update={"exit_iteration": done + TURN}),
        engine=bench.engine,
        data=source,
        schedule=LearningRateSchedule(recipe.optimizer, recipe.train.train_iters, recipe.warmup_iters),
        early_stopping=EarlyStopping(None),
        tracker=tracker,
        guards=guards,
        machine=Machine(flops_per_token=1e6, devices=2, peak_flops=1e12),
        device=torch.device("cpu"),
        validate=lambda: LossTotal(10.0, 10, 40),
        checkpoints=Saved(tracker),
        save_interval=None,
        progress=Progress(step=done, samples=source.consumed_samples),
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    made = tiny_recipe(
        model=SHAPE,
        tokenizer={"vocab_size": 4096},
        train={
            "precision": "fp32",
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "train_iters": 100_000,
            "eval_interval": 90_000,
            "loss_chunk_size": 1024,
        },
        deepspeed="ds_configs/zero1.json",
        tracking={"wandb": {"mode": "disabled"}},
    )
    with tempfile.TemporaryDirectory() as name, RankPool(2) as pool:
        found = pool.run(compare, made, Path(name), count, timeout=3000)[0]
    print(f"a step: {1000 * found['off']:.1f} ms without, {1000 * found['on']:.1f} ms with guards, watchdog and logging", file=sys.stderr)
    print(f"ratio of medians {found['on'] / found['off']:.4f}, median of ratios {found['pairs']:.4f}", file=sys.stderr)
    share = 100 * found["inside"] / found["processor"]
    print(
        f"inside guards and trackers: {1000 * found['inside']:.2f} ms of processor time a step, {share:.2f} % of the step's",
        file=sys.stderr,
    )
