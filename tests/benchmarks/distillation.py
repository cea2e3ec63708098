"""What a teacher is worth: `python -m tests.benchmarks.distillation RUN --keep FOLDER [--layers N] [--seeds N] [section.key=value ...]`.

RUN: the run folder of a trained teacher (prepare, pretrain). Students of N layers (half the teacher's), initialised from its layers or at
random, are trained with and without it, alike in all else: at equal tokens, in the same order, for each seed. Further arguments
change the recipe, such as `distill.train={train_iters: 500, eval_interval: 500}`. The table shows each student's perplexity on the same
held-out text, that of the test split. Exit code 1 where a student is missing; what is finished in FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.chains import COURSE, run_chain, teacher_recipe

STUDENTS = {"teacher's layers": "teacher_layers", "random": "scratch"}
WAYS: dict[str, dict[str, Any]] = {"with the teacher": {}, "without": {"alpha": 0.0}}


def stages(layers: int, seeds: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Each student's entry of `run.stages`, by how it begins and learns, and by seed; all of one seed follow each other."""
    found = {}
    for seed in range(1, seeds + 1):
        for start, init in STUDENTS.items():
            for way, settings in WAYS.items():
                name = f"{init}-{'alone' if settings else 'taught'}-{seed}"
                shape = {"student": {"init": init, "model": {"num_layers": layers}}}
                found[start, way, seed] = {"distill": {"name": name, "seed": seed, **shape, **settings}}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="where the students' run goes")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    layers = given.layers or teacher_recipe(given.run)["model"]["num_layers"] // 2
    entries = stages(layers, given.seeds)
    given.keep.mkdir(parents=True, exist_ok=True)
    found, code = run_chain(
        given.run,
        given.keep.resolve(),
        ["prepare"],
        list(entries.values()),
        {"distill": {"teacher": str((given.run / "pretrain").resolve()), **COURSE}},
        given.overrides,
    )
    seeds = range(1, given.seeds + 1)
    print(f"\nstudents of {layers} layers, perplexity")
    print(f"| initialised from | trained | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |\n|---|---|{'---|' * (given.seeds + 1)}")
    for start in STUDENTS:
        for way in WAYS:
            names = [entries[start, way, seed]["distill"]["name"] for seed in seeds]
            row = [found[name]["perplexity"] for name in names if name in found]
            mean = f"{statistics.mean(row):.3f}" if len(row) == given.seeds else "-"
            shown = [f"{found[name]['perplexity']:.3f}" if name in found else "-" for name in names]
            print(f"| {start} | {way} | {' | '.join(shown)} | {mean} |")
    return code


if __name__ == "__main__":
    sys.exit(main())
