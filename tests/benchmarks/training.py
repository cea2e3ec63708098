"""Training speed beside a plain loop, for a 34M Llama: `python -m tests.benchmarks.training [section.key=value ...]`.

Some minutes on two cores. Anything else that runs meanwhile makes the figures worthless.
"""

from __future__ import annotations

import sys
from pathlib import Path

from largeformer.cli import main

RECIPE = Path(__file__).parent / "llama-34m.yaml"

if __name__ == "__main__":
    sys.exit(main(["bench", "-c", str(RECIPE), *sys.argv[1:]]))
