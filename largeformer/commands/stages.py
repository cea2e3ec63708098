"""Commands that run stages of a recipe, and use what they made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from largeformer.commands.arguments import DONE, Config, DryRun, Fresh, From, MaybeConfig, Overrides, WorldSize, exit_code, load, load_for


def prepare(
    config: Config,
    overrides: Overrides = None,
    append: Annotated[bool, typer.Option("--append", help="Add new sources or files to what is prepared, with its tokenizer.")] = False,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """Text to tokenizer and indexed dataset."""
    recipe = load(config, overrides, dry_run, world_size)
    from largeformer.stages import prepare as stage

    return exit_code(stage.run_or_wait(recipe, fresh=fresh, append=append))


def pretrain(
    config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False, world_size: WorldSize = None
) -> int:
    """Train; resumes by itself, and prepares first where that is still to do."""
    recipe = load(config, overrides, dry_run, world_size)
    from largeformer.stages import pretrain as stage

    return exit_code(stage.run(recipe, fresh=fresh))


def prune(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """Channels, heads, layers or single weights out of a trained model."""
    recipe = load_for(source, config, overrides, dry_run, world_size)
    from largeformer.stages import prune as stage

    return exit_code(stage.run(recipe, source, fresh=fresh))


def distill(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """Train a smaller or pruned student on what a teacher says."""
    recipe = load_for(source, config, overrides, dry_run, world_size)
    from largeformer.stages import distill as stage

    return exit_code(stage.run(recipe, source, fresh=fresh))


def evaluate(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    scores: Annotated[
        Path | None, typer.Option("--scores", metavar="FOLDER", help="Write each training sample's loss there instead, for a curriculum.")
    ] = None,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """Loss, perplexity and bits per byte of a checkpoint."""
    recipe = load_for(source, config, overrides, dry_run, world_size)
    if scores is not None:
        from largeformer.stages import scoring

        scoring.run(recipe, source, scores)
        return DONE
    from largeformer.stages import evaluate as stage

    return exit_code(stage.run(recipe, source))


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="The text to go on from.")],
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", metavar="N")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="N", help="0 keeps all.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p")] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
) -> int:
    """Text from a checkpoint, by default of the run's last model."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    flags = [f"generate.{key}={value}" for key, value in sampling.items() if value is not None]
    recipe = load_for(source, config, [*(overrides or []), *flags])
    from largeformer.stages import generate as stage

    return exit_code(stage.run(recipe, source, prompt, recipe.generate))


def quantize(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    fresh: Fresh = False,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """A model whose linear layers are to be integers, calibrated."""
    recipe = load_for(source, config, overrides, dry_run, world_size)
    from largeformer.stages import quantize as stage

    return exit_code(stage.run(recipe, source, fresh=fresh))


def run_stages(
    config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False, world_size: WorldSize = None
) -> int:
    """The recipe's stages in turn, skipping those that are done."""
    recipe = load(config, overrides, dry_run, world_size, all_stages=True)
    from largeformer.stages import pipeline as stage

    return exit_code(stage.run(recipe, fresh=fresh))
