"""Commands between our checkpoints and other people's tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from largeformer.commands.arguments import DryRun, Fresh, From, MaybeConfig, Overrides, WorldSize, exit_code, load_for


def export(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """A checkpoint for transformers, vLLM, onnxruntime, each compared."""
    recipe = load_for(source, config, overrides, dry_run, world_size)
    from largeformer.stages import export as stage

    return exit_code(stage.run(recipe, source, fresh=fresh))


def import_folder(
    source: Annotated[
        Path,
        typer.Option(
            "--from", metavar="FOLDER", help="A Hugging Face folder (config.json, safetensors, tokenizer), or one of our own (config.yaml)."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="The run folder to make.")],
    overrides: Overrides = None,
    fresh: Fresh = False,
) -> int:
    """A Hugging Face or exported folder to a largeformer checkpoint."""
    from largeformer.stages import import_ as stage

    return exit_code(stage.run(source, output, overrides or [], fresh=fresh))
