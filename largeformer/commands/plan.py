"""The command that asks before it is launched."""

from __future__ import annotations

from typing import Annotated

import typer

from largeformer.commands.arguments import AsJson, Config, Overrides, exit_code, load


def plan(
    config: Config,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option("--world-size", min=1, metavar="N", help="GPUs; without it, the fewest.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="a100, h100, h200, b200, l40s or cpu.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", metavar="N", help="To train on; without it, train.train_iters.")] = None,
    price: Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0.0, metavar="MONEY")] = None,
    search: Annotated[bool, typer.Option("--search", help="The best layouts, and why others fail.")] = False,
    business: Annotated[bool, typer.Option("--business", help="Costs, benefits and payback, by plan.business.")] = False,
    as_json: AsJson = False,
) -> int:
    """Memory, time and money of a run, for any cluster, without a GPU."""
    flags = {"gpu": gpu, "price_per_gpu_hour": price}
    given = [f"plan.{name}={value}" for name, value in flags.items() if value is not None]
    recipe = load(config, [*(overrides or []), *given])
    from largeformer.stages import plan as stage

    return exit_code(stage.run(recipe, world_size=world_size, tokens=tokens, search_layouts=search, business=business, as_json=as_json))
