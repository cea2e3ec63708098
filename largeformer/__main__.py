"""`python -m largeformer`, and what `deepspeed --module largeformer` starts."""

from __future__ import annotations

import sys

from largeformer.training.signals import StopSignals


def main() -> int:
    """The command line in a process of its own, with its handlers of signals set before anything heavy is imported."""
    StopSignals.install()
    from largeformer import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
