"""The command that hands a run to a cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from largeformer.commands.arguments import DONE, Config, Overrides, load


def submit(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, metavar="N")] = 1,
    time: Annotated[
        str, typer.Option("--time", metavar="LIMIT", help="SLURM's time limit of one go; the run requeues itself.")
    ] = "24:00:00",
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=0, metavar="N", help="0: none is asked for.")] = 0,
    ranks_per_node: Annotated[
        int | None, typer.Option("--ntasks-per-node", min=1, metavar="N", help="Ranks of a node; without it, one a GPU.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option("--cpus-per-task", min=1, metavar="N")] = None,
    partition: Annotated[str | None, typer.Option("--partition", metavar="NAME")] = None,
    account: Annotated[str | None, typer.Option("--account", metavar="NAME")] = None,
    container: Annotated[str, typer.Option("--container", metavar="IMAGE", help="A *.sif file, or an image for pyxis.")] = "",
    stage: Annotated[str, typer.Option("--stage", metavar="STAGE", help="pretrain, or run for all stages.")] = "pretrain",
    sbatch: Annotated[list[str] | None, typer.Option("--sbatch", metavar="OPTION", help="Any other option of sbatch.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, write and submit nothing.")] = False,
) -> int:
    """Write and submit a SLURM script that saves, requeues and goes on by itself."""
    recipe = load(config, overrides)
    from largeformer.launching.slurm import Job
    from largeformer.stages import submit as stage_of_submit

    ranks = ranks_per_node or gpus_per_node or 1
    job = Job(recipe.run.name, nodes, ranks, gpus_per_node, time, cpus_per_task, partition, account)
    stage_of_submit.run(recipe, job, stage=stage, container=container, options=sbatch or (), dry_run=dry_run)
    return DONE
