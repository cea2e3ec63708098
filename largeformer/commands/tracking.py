"""Commands about the record of runs: a page to read, and offline runs to send."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from largeformer.commands.arguments import DONE, AsJson, exit_code


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs; several are compared.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the page goes.")] = Path("report.html"),
) -> int:
    """One HTML page with curves, events, samples and lineage."""
    from largeformer.stages import report as stage

    stage.run(runs, output)
    return DONE


def lineage(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output folder.")],
    as_json: AsJson = False,
) -> int:
    """The tree of a run's artifacts: what was made from what."""
    from largeformer.stages import lineage as stage

    return exit_code(stage.run(run, as_json=as_json))


def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs, or W&B's own folders in them.")],
    online: Annotated[bool, typer.Option("--online", help="Send also runs recorded online, whose upload was cut off.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Send also what was sent before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be sent.")] = False,
) -> int:
    """Send runs that W&B recorded offline."""
    from largeformer.stages import sync as stage

    return exit_code(stage.run(runs, online=online, again=again, dry_run=dry_run))
