"""The command line: `largeformer STAGE -c RECIPE [section.key=value ...]`.

It reads the recipe, calls one stage and turns what comes back into an exit code: 0 done; 1 failed; 2 bad arguments or
recipe; 75 stopped on a signal after saving; 130 interrupted. Stages, and with them torch, are imported inside the
command, so that help and mistakes are told at once.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from largeformer import __version__
from largeformer.errors import BadInputError

if TYPE_CHECKING:
    from largeformer.config.schema import Recipe

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Whatever is wrong with a command line is told by an exception of this class, which Typer does not name in public.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

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


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train large Transformers: Megatron-core splits the model, DeepSpeed trains it, W&B keeps the record."""
    # The deepspeed launcher passes --local_rank before the stage; LOCAL_RANK says the same.
    if version:
        typer.echo(f"largeformer {__version__}")
        raise typer.Exit(DONE)
    if context.invoked_subcommand is None:
        raise typer.BadParameter("name a stage; see largeformer --help")


@app.command()
def prepare(
    config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False, world_size: WorldSize = None
) -> int:
    """Text to tokenizer and indexed dataset."""
    recipe = _load(config, overrides, dry_run, world_size)
    from largeformer.stages import prepare as stage

    return _exit_code(stage.run_or_wait(recipe, fresh=fresh))


@app.command()
def pretrain(
    config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False, world_size: WorldSize = None
) -> int:
    """Train; resumes by itself, and prepares first where that is still to do."""
    recipe = _load(config, overrides, dry_run, world_size)
    from largeformer.stages import pretrain as stage

    return _exit_code(stage.run(recipe, fresh=fresh))


@app.command()
def evaluate(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    source: From = None,
    dry_run: DryRun = False,
    world_size: WorldSize = None,
) -> int:
    """Loss, perplexity and bits per byte of a checkpoint."""
    recipe = _load_for(source, config, overrides, dry_run, world_size)
    from largeformer.stages import evaluate as stage

    return _exit_code(stage.run(recipe, source))


@app.command()
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
    """Text from a checkpoint."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    flags = [f"generate.{key}={value}" for key, value in sampling.items() if value is not None]
    recipe = _load_for(source, config, [*(overrides or []), *flags])
    from largeformer.stages import generate as stage

    return _exit_code(stage.run(recipe, source or Path(recipe.run.output_dir) / "pretrain", prompt, recipe.generate))


@app.command("run")
def run_stages(
    config: Config, overrides: Overrides = None, fresh: Fresh = False, dry_run: DryRun = False, world_size: WorldSize = None
) -> int:
    """The recipe's stages in turn, skipping those that are done."""
    recipe = _load(config, overrides, dry_run, world_size)
    from largeformer.stages import pipeline as stage

    return _exit_code(stage.run(recipe, fresh=fresh))


@app.command()
def parity(config: Config, overrides: Overrides = None, nproc: Nproc = None) -> int:
    """This recipe's layout against one process: loss, gradient norm, gradients."""
    recipe = _load(config, overrides)
    ranks = _fitting(recipe, nproc or max(2, _smallest_world(recipe)))
    from largeformer.stages import parity as stage

    return _exit_code(stage.run(recipe, ranks))


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    nproc: Nproc = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, metavar="N", help="Turns that each contestant takes.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Steps of a turn.")] = 4,
    as_json: AsJson = False,
) -> int:
    """Tokens per second and MFU, beside a plain PyTorch loop of the same model."""
    recipe = _load(config, overrides)
    ranks = _fitting(recipe, nproc or _smallest_world(recipe))
    from largeformer.stages import bench as stage

    return _exit_code(stage.run(recipe, ranks, rounds=rounds, steps=steps, as_json=as_json))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Option("--config", "-c", metavar="RECIPE", help="Check what this recipe needs.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> int:
    """What this machine has, and what would fail, each with its remedy."""
    if overrides and config is None:
        raise BadInputError(f"override '{overrides[0]}' has no recipe to change: give one with -c")
    recipe = _load(config, overrides) if config is not None else None
    from largeformer.stages import doctor as stage

    return _exit_code(stage.run(recipe, as_json))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input is told once, by rank 0; a failure by every rank that sees it."""
    _quieten_libraries()
    try:
        return _exit_code(app(args=None if arguments is None else list(arguments), prog_name="largeformer", standalone_mode=False))
    except BadInputError as error:
        if _speaks_for_all():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return BAD_INPUT
    except _UsageError as error:
        if _speaks_for_all():
            error.show()
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`): nothing is left to say, also not when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception:
        traceback.print_exc()
        return FAILED


def _quieten_libraries() -> None:
    """Megatron-core warns at import of each optional package that is missing, and torch of its own defaults: neither is news."""
    for module in ("megatron", "deepspeed", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    for name in ("megatron", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(
    config: str, overrides: list[str] | None, dry_run: bool = False, world_size: int | None = None, *, with_deepspeed: bool = True
) -> Recipe:
    """The recipe; under `--dry-run`, print what it comes to and stop."""
    from largeformer.config.load import load_recipe

    recipe = load_recipe(config, overrides or [], with_deepspeed=with_deepspeed)
    if dry_run:
        _print_dry_run(recipe, world_size)
        raise typer.Exit(DONE)
    if world_size is not None:
        raise BadInputError(f"--world-size {world_size} belongs to --dry-run: the launcher sets the world of a real run")
    return recipe


def _load_for(
    source: Path | None, config: str | None, overrides: list[str] | None, dry_run: bool = False, world_size: int | None = None
) -> Recipe:
    """The recipe given, or the one that `source` was made with. A run that was moved is read, and written, where it is now."""
    from largeformer.config.resources import find_run_recipe

    if config is not None:
        return _load(config, overrides, dry_run, world_size)
    if source is None:
        raise BadInputError("neither a recipe nor a run is given: add -c RECIPE, or --from RUN_OR_CKPT")
    recorded, folder = find_run_recipe(source)
    here = [f"run.output_dir={json.dumps(str(folder))}"] if folder is not None else []
    # It trains nothing, so the DeepSpeed config need not have moved along.
    return _load(str(recorded), [*here, *(overrides or [])], dry_run, world_size, with_deepspeed=dry_run)


def _print_dry_run(recipe: Recipe, world_size: int | None) -> None:
    from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
    from largeformer.config.dry_run import dry_run_report
    from largeformer.parallel.environment import discover

    launched = discover(os.environ).world_size
    size = world_size or (launched if launched > 1 else _smallest_world(recipe))
    resolved = resolve_deepspeed(recipe, load_deepspeed(recipe), size)
    if _speaks_for_all():
        typer.echo(dry_run_report(recipe, resolved, size))


def _smallest_world(recipe: Recipe) -> int:
    return recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size


def _fitting(recipe: Recipe, nproc: int) -> int:
    """`nproc`, or BadInputError where the recipe does not fit as many ranks."""
    from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed

    resolve_deepspeed(recipe, load_deepspeed(recipe), nproc)
    return nproc


def _exit_code(result: object) -> int:
    """A stage's own exit code where it returns one, such as 75; an artifact, or None where it was asked to stop early, is success."""
    return result if isinstance(result, int) else DONE


def _speaks_for_all() -> bool:
    """Whether this is rank 0, or its launcher variables are themselves at fault, which other ranks may not see."""
    from largeformer.parallel.environment import discover

    try:
        return discover(os.environ).is_main
    except BadInputError:
        return True
