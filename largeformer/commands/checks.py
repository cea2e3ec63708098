"""Commands that measure and check: the layout, the speed, the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from largeformer.commands.arguments import AsJson, Config, Nproc, Overrides, exit_code, fitting, load, smallest_world
from largeformer.errors import BadInputError


def parity(config: Config, overrides: Overrides = None, nproc: Nproc = None) -> int:
    """This recipe's layout against one process: loss, gradient norm, gradients."""
    recipe = load(config, overrides)
    ranks = fitting(recipe, nproc or max(2, smallest_world(recipe)))
    from largeformer.stages import parity as stage

    return exit_code(stage.run(recipe, ranks))


def bench(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Turns that each contestant takes.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of a turn.")] = 4,
    as_json: AsJson = False,
) -> int:
    """Tokens per second and MFU, beside a plain PyTorch loop of the same model."""
    recipe = load(config, overrides)
    ranks = fitting(recipe, nproc or smallest_world(recipe))
    from largeformer.stages import bench as stage

    return exit_code(stage.run(recipe, ranks, rounds=rounds, steps=steps, as_json=as_json))


def doctor(
    config: Annotated[str | None, typer.Option("--config", "-c", metavar="RECIPE", help="Check what this recipe needs.")] = None,
    overrides: Overrides = None,
    hostfile: Annotated[Path | None, typer.Option("--hostfile", metavar="FILE", help="Check a hostfile of deepspeed too.")] = None,
    as_json: AsJson = False,
) -> int:
    """What this machine has, and what would fail, each with its remedy."""
    if overrides and config is None:
        raise BadInputError(f"override '{overrides[0]}' has no recipe to change: give one with -c")
    recipe = load(config, overrides) if config is not None else None
    from largeformer.stages import doctor as stage

    return exit_code(stage.run(recipe, as_json, hostfile))
