"""Training speed beside a plain loop, for a 34M Llama: `python -m tests.benchmarks.training [section.key=value ...]`.

Some minutes on two cores. Anything else that runs meanwhile makes the figures worthless.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from largeformer.config.load import load_recipe
from largeformer.stages import bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps in a turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    recipe = load_recipe(str(Path(__file__).parent / "llama-34m.yaml"), arguments.overrides)
    return bench.run(recipe, rounds=arguments.rounds, steps=arguments.steps, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
