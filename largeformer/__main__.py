"""`python -m largeformer`, and what `deepspeed --module largeformer` starts."""

from __future__ import annotations

import sys

from largeformer.cli import main

if __name__ == "__main__":
    sys.exit(main())
