"""`report`: one HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from largeformer.artifact import write_atomically
from largeformer.errors import BadInputError


def run(folders: Sequence[Path], output: Path) -> None:
    """Write the page about the runs in `folders` to `output`, and say on standard output what it holds and what could not be read.

    Raises BadInputError for a folder that holds no run, or an output that cannot be written.
    """
    from largeformer.tracking.report.collect import collect
    from largeformer.tracking.report.page import render

    problems: list[str] = [f"{output} is a folder: name a file, such as -o report.html"] if output.is_dir() else []
    if not output.parent.is_dir():
        problems.append(f"-o {output}: the folder {output.parent} does not exist")
    runs = []
    for folder in folders:
        try:
            runs.append(collect(folder))
        except BadInputError as error:
            problems += error.problems
    if problems:
        raise BadInputError(problems)
    page = render(runs).encode()
    try:
        write_atomically(output, page)
    except OSError as error:
        raise BadInputError(f"-o {output} cannot be written: {error.strerror}") from error
    for one in runs:
        stages = ", ".join(f"{stage.name} ({len(stage.training):,} rows)" if stage.training else stage.name for stage in one.stages)
        print(f"{one.name}: {stages}")
        for problem in one.problems:
            print(f"  {problem}")
    print(f"{output}: {len(page) / 1e6:.2f} MB, open it in a browser")
