"""The command line: `largeformer STAGE -c RECIPE [section.key=value ...]`.

A command of `commands/` reads the recipe and calls one stage; what comes back becomes an exit code: 0 done; 1 failed; 2 bad arguments or
recipe; 75 stopped on a signal after saving; 130 interrupted. Stages, and with them torch, are imported inside the
command, so that help and mistakes are told at once.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from largeformer import __version__
from largeformer.commands import checkpoint, checks, export, launching, plan, stages, tracking
from largeformer.commands.arguments import DONE, exit_code, speaks_for_all
from largeformer.errors import BadInputError, StageFailed
from largeformer.training.signals import EXIT_CODE as STOPPED
from largeformer.training.signals import StopRequested, StopSignals

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
SAVE_WHEN_ASKED_TO_STOP = {"prepare", "pretrain", "prune", "distill", "quantize", "run"}  # the others end at a SIGTERM as any program does

# Whatever is wrong with a command line is told by an exception of this class, which Typer does not name in public.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    if context.invoked_subcommand not in SAVE_WHEN_ASKED_TO_STOP:
        StopSignals.current().release()


for command in (
    stages.prepare,
    stages.pretrain,
    stages.prune,
    stages.distill,
    stages.evaluate,
    stages.generate,
    checks.parity,
    checks.bench,
    checks.doctor,
):
    app.command()(command)
app.command("run")(stages.run_stages)
app.command("plan")(plan.plan)
app.add_typer(checkpoint.commands, name="checkpoint")
app.command()(launching.submit)
app.command()(tracking.report)
app.command()(tracking.lineage)
app.command()(tracking.sync)
app.command()(stages.quantize)
app.command("export")(export.export)
app.command("import")(export.import_folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input is told once, by rank 0; a failure by every rank that sees it."""
    _quieten_libraries()
    try:
        return exit_code(app(args=None if arguments is None else list(arguments), prog_name="largeformer", standalone_mode=False))
    except BadInputError as error:
        if speaks_for_all():
            for problem in error.problems:
                print(f"error: {problem}", file=sys.stderr)
        return BAD_INPUT
    except StageFailed as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return FAILED
    except _UsageError as error:
        if speaks_for_all():
            error.show()
        return BAD_INPUT
    except StopRequested as stop:
        if speaks_for_all():
            print(f"{stop}; the same command goes on from here", file=sys.stderr)
        return STOPPED
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
