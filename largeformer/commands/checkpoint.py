"""Commands that look at checkpoints, check them, and make other things of them. None needs the recipe, a GPU, or other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from largeformer.commands.arguments import AsJson, exit_code

Source = Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a stage or run folder with some.", show_default=False)]

commands = typer.Typer(no_args_is_help=True, help="Look at checkpoints, check them, consolidate them.")


@commands.command("list")
def list_checkpoints(path: Source, as_json: AsJson = False) -> int:
    """A table of the checkpoints under PATH: step, progress, validation, size, and whether all files are there."""
    from largeformer.stages import checkpoint as stage

    return exit_code(stage.show_list(path, as_json))


@commands.command()
def verify(path: Source, as_json: AsJson = False) -> int:
    """Compare every file with the SHA-256 that it was written with. Exit code 1 where a checkpoint is damaged."""
    from largeformer.stages import checkpoint as stage

    return exit_code(stage.verify(path, as_json))


@commands.command()
def inspect(path: Source, as_json: AsJson = False) -> int:
    """Layout, progress, and every tensor's shape and dtype; of the newest checkpoint where PATH holds several."""
    from largeformer.stages import checkpoint as stage

    return exit_code(stage.inspect(path, as_json))


@commands.command()
def convert(
    path: Source,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="A folder that is not there yet.")],
    weights: Annotated[
        Literal["model", "fp32"], typer.Option("--weights", help="In the model's dtype, or the float32 masters of the optimizer.")
    ] = "model",
    max_shard_gib: Annotated[
        float, typer.Option("--max-shard-gib", min=0.0001, max=1e6, metavar="N", help="Size at which a new file begins.")
    ] = 5.0,
) -> int:
    """Write whole tensors under their global names: a consolidated safetensors folder, with an index where there are several files."""
    from largeformer.stages import checkpoint as stage

    return exit_code(stage.convert(path, output, weights == "fp32", max_shard_gib))
