"""`largeformer report` of a long run: seconds and megabytes, over the number of logged steps.

python -m tests.benchmarks.report [rounds]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from largeformer.stages import report
from tests.tracking.report.runs import write_long


def main(rounds: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for steps in (1_000, 10_000, 100_000):
            write_long(folder / str(steps) / "pretrain", steps, {})
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                report.run([folder / str(steps)], folder / "report.html")
                seconds.append(time.perf_counter() - began)
            size = (folder / "report.html").stat().st_size / 1e6
            print(f"{steps:>7,} steps: {min(seconds):6.2f} s, {size:.2f} MB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
