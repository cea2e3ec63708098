"""`submit`: a SLURM batch job that trains a recipe: checked, written beside the run, and handed to sbatch."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from largeformer.artifact import write_atomically
from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed, resolve_for_run
from largeformer.config.load import recipe_yaml
from largeformer.config.resources import batch_script
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.launching.slurm import Job, fill_in, submit
from largeformer.stages.common.world import output_problems

TEMPLATES = {"pretrain": "pretrain", "run": "pipeline"}


def run(recipe: Recipe, job: Job, *, stage: str, container: str, options: Sequence[str] = (), dry_run: bool = False) -> None:
    """Write script and recipe under `<output_dir>/slurm/` and submit the script; with `dry_run` print it and write nothing.

    The job reads the recipe as it is now, however long it waits in the queue. Raises BadInputError where recipe and cluster do not fit,
    where nothing can be written, and where SLURM refuses.
    """
    _check(recipe, job, stage)
    folder, resolved = Path(recipe.run.output_dir) / "slurm", recipe_yaml(recipe)
    fingerprint = hashlib.sha256(f"{resolved}{stage}{job}{container}".encode()).hexdigest()[:8]
    frozen, script = folder / f"{fingerprint}.yaml", folder / f"{fingerprint}.sbatch"
    variables = {
        "RECIPE": str(frozen),
        "OUTPUT_DIR": recipe.run.output_dir,
        "VENV": sys.prefix if sys.prefix != sys.base_prefix else "",
        "CONTAINER": container,
        **({} if stage == "run" else {"STAGE": stage}),
    }
    text = fill_in(batch_script(TEMPLATES[stage]), job, str(folder / "%x-%j.log"), variables)
    if dry_run:
        print(text, end="")
        print(f"{script} was not written, and nothing submitted: {job.nodes} nodes, {job.world_size} ranks", file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(frozen, resolved.encode())
    write_atomically(script, text.encode())
    number = submit(script, options)
    print(f"job {number} is submitted: {script}, {job.nodes} nodes, {job.world_size} ranks")
    print(f"its output: {folder}/*-{number}.log, and {recipe.run.output_dir}/logs/{number}-RANK.log")


def _check(recipe: Recipe, job: Job, stage: str) -> None:
    problems = job.problems() + output_problems(recipe)
    if stage not in TEMPLATES:
        problems.append(f"--stage {stage} has no batch script; choose {' or '.join(TEMPLATES)}")
    try:
        resolve = resolve_for_run if stage == "run" else resolve_deepspeed
        resolve(recipe, load_deepspeed(recipe), job.world_size)
    except BadInputError as error:
        fix = f"--nodes {job.nodes} with {job.ranks_per_node} ranks each"
        problems += [f"{problem} ({fix})" for problem in error.problems]
    if "\n" in os.fspath(recipe.run.output_dir):
        problems.append("run.output_dir holds a line break; choose another name")
    if problems:
        raise BadInputError(problems)
