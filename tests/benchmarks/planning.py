"""`python -m tests.benchmarks.planning`: a plan's tokens per second beside published ones, as the table of docs/planning.md.

With `--fit`, the constants that make the fitted half's errors least, by trying values around those that stand now.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from unittest import mock

from largeformer.planning import efficiency
from largeformer.planning.step import step_time
from tests.planning.published import FITTED, HELD_OUT, RUNS, UNDERSTATED, Run


def predicted(run: Run) -> float:
    """Tokens a GPU and second."""
    return step_time(run.job).tokens_per_s / run.gpus


def error(run: Run) -> float:
    return predicted(run) / run.tokens_per_gpu_s - 1.0


def summary(runs: Iterable[Run]) -> str:
    errors = [abs(error(run)) for run in runs]
    return f"mean error {statistics.mean(errors):.1%}, median {statistics.median(errors):.1%}, largest {max(errors):.1%}"


def main(arguments: Sequence[str]) -> None:
    if "--fit" in arguments:
        for family in ("ampere", "hopper"):
            print(family, fit(family))
        return
    print("| run | source | measured | planned | error | |\n|---|---|---|---|---|---|")
    for number, run in enumerate(RUNS):
        half = "fitted" if number % 2 == 0 else "held out"
        print(f"| {run.name} | {run.source} | {run.tokens_per_gpu_s:,.0f} | {predicted(run):,.0f} | {error(run):+.0%} | {half} |")
    print(f"\nfitted: {summary(FITTED)}\nheld out: {summary(HELD_OUT)}")
    for run in UNDERSTATED:
        print(f"beside the table: {run.name}: measured {run.tokens_per_gpu_s:,.0f}, planned {predicted(run):,.0f}, {error(run):+.0%}")


def fit(family: str) -> efficiency.Efficiency:
    """Least sum of squared relative errors over the fitted runs of this family's GPUs."""
    runs = [run for run in FITTED if run.cluster.gpu.family == family]
    jobs = [(run, run.job) for run in runs]
    best, least = efficiency.FAMILIES[family], float("inf")
    grid = itertools.product([0.56 + 0.02 * step for step in range(18)], [0.5, 0.6, 0.75, 0.9], [0.5, 0.6, 0.7, 0.8, 0.9])
    for matmul, memory, link in grid:
        tried = replace(best, matmul=matmul, memory=memory, link=link)
        with mock.patch.dict(efficiency.FAMILIES, {family: tried}):
            squares = sum((step_time(job, exact=False).tokens_per_s / run.gpus / run.tokens_per_gpu_s - 1) ** 2 for run, job in jobs)
        if squares < least:
            best, least = tried, squares
    return best


if __name__ == "__main__":
    main(sys.argv[1:])
