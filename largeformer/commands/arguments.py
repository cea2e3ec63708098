"""What commands share: their options, and how a recipe is read for them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from largeformer.errors import BadInputError

if TYPE_CHECKING:
    from largeformer.config.schema import Recipe

DONE = 0

Config = Annotated[str, typer.Option("--config", "-c", metavar="RECIPE", help="A recipe's YAML file, or the name of a shipped one.")]
MaybeConfig = Annotated[
    str | None, typer.Option("--config", "-c", metavar="RECIPE", help="A recipe; without it, the one that --from was made with.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="SECTION.KEY=VALUE", help="Values that replace the recipe's.", show_default=False)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print recipe, rank layout and DeepSpeed config, and stop.")]
WorldSize = Annotated[int | None, typer.Option("--world-size", min=1, metavar="N", help="Ranks that --dry-run lays out.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Set aside what another recipe left in the output folder.")]
From = Annotated[Path | None, typer.Option("--from", metavar="RUN_OR_CKPT", help="A run, a stage or a checkpoint folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Nproc = Annotated[int | None, typer.Option("--nproc", min=1, metavar="N", help="Processes to start on this machine.")]


def load(
    config: str,
    overrides: list[str] | None,
    dry_run: bool = False,
    world_size: int | None = None,
    *,
    with_deepspeed: bool = True,
    all_stages: bool = False,
) -> Recipe:
    """The recipe; under `--dry-run`, print what it comes to and stop. `all_stages`: the dry run is of all of `run.stages`."""
    from largeformer.config.load import load_recipe

    recipe = load_recipe(config, overrides or [], with_deepspeed=with_deepspeed)
    if dry_run:
        _print_dry_run(recipe, world_size, all_stages)
        raise typer.Exit(DONE)
    if world_size is not None:
        raise BadInputError(f"--world-size {world_size} belongs to --dry-run: the launcher sets the world of a real run")
    return recipe


def load_for(
    source: Path | None, config: str | None, overrides: list[str] | None, dry_run: bool = False, world_size: int | None = None
) -> Recipe:
    """The recipe given, or the one that `source` was made with. A run that was moved is read, and written, where it is now."""
    from largeformer.config.resources import find_run_recipe

    if config is not None:
        return load(config, overrides, dry_run, world_size)
    if source is None:
        raise BadInputError("neither a recipe nor a run is given: add -c RECIPE, or --from RUN_OR_CKPT")
    recorded, folder = find_run_recipe(source)
    here = [f"run.output_dir={json.dumps(str(folder))}"] if folder is not None else []
    # It trains nothing, so the DeepSpeed config need not have moved along.
    return load(str(recorded), [*here, *(overrides or [])], dry_run, world_size, with_deepspeed=dry_run)


def _print_dry_run(recipe: Recipe, world_size: int | None, all_stages: bool) -> None:
    from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed, resolve_for_run
    from largeformer.config.dry_run import dry_run_report
    from largeformer.parallel.environment import discover

    launched = discover(os.environ).world_size
    size = world_size or (launched if launched > 1 else smallest_world(recipe))
    resolved = (resolve_for_run if all_stages else resolve_deepspeed)(recipe, load_deepspeed(recipe), size)
    if speaks_for_all():
        typer.echo(dry_run_report(recipe, resolved, size))


def smallest_world(recipe: Recipe) -> int:
    return recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size


def fitting(recipe: Recipe, nproc: int) -> int:
    """`nproc`, or BadInputError where the recipe does not fit as many ranks."""
    from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed

    resolve_deepspeed(recipe, load_deepspeed(recipe), nproc)
    return nproc


def exit_code(result: object) -> int:
    """A stage's own exit code where it returns one, such as 75; an artifact, or None where it was asked to stop early, is success."""
    return result if isinstance(result, int) else DONE


def speaks_for_all() -> bool:
    """Whether this is rank 0, or its launcher variables are themselves at fault, which other ranks may not see."""
    from largeformer.parallel.environment import discover

    try:
        return discover(os.environ).is_main
    except BadInputError:
        return True
