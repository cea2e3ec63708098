"""`prepare`: text -> tokenizer -> indexed token ids, in `<output_dir>/prepare/`, by one process of the world and its helpers.

tokenizer.model          trained on a sample of the sources, or copied from `tokenizer.model` (tokenizer.json where that is its kind)
0-<name>.bin/.idx ...    one pair for each source
quarantine.jsonl         what was rejected: file, line, reason
statistics.json          what was kept, dropped and changed; report.html shows it
files.jsonl              the files read, each with size and time of last change
deduplication/           digests and signatures of the documents, where duplicates are looked for
config.yaml              the recipe, resolved
manifest.json            last of all: prepare is finished
work/                    only while it is not: see `data/preparation/workspace.py`
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from largeformer.artifact import Artifact, identity_hash, read_status, size_problems
from largeformer.config.schema import Recipe
from largeformer.data.preparation.workspace import Workspace
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.common.claim import claim, set_aside
from largeformer.stages.common.lock import alone
from largeformer.stages.common.prepared_data import KIND, stage_folder
from largeformer.stages.common.world import output_problems, reporting
from largeformer.stages.prepare_folder import Preparation, check_base
from largeformer.training.signals import StopRequested, StopSignals

_STOPS_TOGETHER_S = 20.0  # between a signal to a waiting rank and its end, where the rank that prepares has not stopped or finished
_CLOCK_SLACK_S = 2.0  # what the clocks of two machines may differ


def run(recipe: Recipe, *, fresh: bool = False, append: bool = False) -> Artifact:
    """Prepare the recipe's data, or return what is there. On one process only; other ranks call `wait_or_load`.

    `fresh` sets the result of another recipe aside (`prepare.old-N`) instead of refusing to replace it. `append` adds to the finished
    result of a recipe with fewer sources or files, with its tokenizer, and encodes the new ones alone. Where another run of the same folder
    prepares, its result is waited for. Raises BadInputError.
    """
    folder = stage_folder(recipe)
    identity = identity_hash(recipe.identity(KIND))
    with reporting(recipe, KIND), StopSignals.current().at_once(), alone(folder, f"preparing {folder}"):
        there = Artifact.read(folder)
        if there is not None and there.identity == identity and (problems := _damage(there)):
            if not fresh:
                more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
                raise BadInputError(
                    f"{folder} has finished, but {problems[0]}{more}: restore it, since models were trained on it, or pass --fresh to set "
                    "the folder aside and prepare anew"
                )
            set_aside(folder)
            there = None
        if there is not None:
            Workspace(folder).remove_if_done()
        if there is not None and append:
            if fresh:
                raise BadInputError("--append adds to what is prepared, --fresh sets it aside: give one of them")
            check_base(recipe, folder)
            return Preparation(recipe, folder).run(append=True)
        if there is not None and there.identity == identity:
            return there
        claim(folder, recipe, KIND, fresh)
        if recipe.data.is_mock:
            return Artifact(KIND, folder, identity).write()
        return Preparation(recipe, folder).run(append=False)


def run_or_wait(recipe: Recipe, *, fresh: bool = False, append: bool = False) -> Artifact:
    """`run` on rank 0 of the world that the launcher made, `wait_or_load` on the others. Raises BadInputError where the output folder
    cannot be written."""
    if problems := output_problems(recipe):
        raise BadInputError(problems)
    return run(recipe, fresh=fresh, append=append) if discover(os.environ).is_main else wait_or_load(recipe)


def wait_or_load(recipe: Recipe, *, since: float | None = None, poll_seconds: float = 0.5, timeout: float | None = None) -> Artifact:
    """The prepare artifact, as soon as the rank that makes it has finished: without a collective, which would time out.

    A failure written before `since` (seconds since the epoch; by default about when this process started) is an earlier run's.
    timeout: seconds, None for ever. Raises BadInputError where prepare failed on the rank that runs it, TimeoutError.
    """
    folder = stage_folder(recipe)
    identity = identity_hash(recipe.identity(KIND))
    started, signals = time.monotonic(), StopSignals.current()
    since = since if since is not None else _process_start() - _CLOCK_SLACK_S
    while True:
        there = Artifact.read(folder)
        if there is not None and there.identity == identity and not _damage(there):
            return there
        status = read_status(folder.parent) or {}
        if status.get("status") == "failed" and status.get("stage") == KIND and status.get("time", 0.0) >= since:
            raise BadInputError(f"prepare failed on the rank that runs it: {status.get('error', 'no reason given')}")
        # No slack here: the run that was stopped a second ago is the one that this one goes on with.
        if status.get("status") == "requeue" and status.get("stage") == KIND and status.get("time", 0.0) >= since + _CLOCK_SLACK_S:
            raise StopRequested(f"prepare was {status.get('reason')} on the rank that runs it")
        if signals.seconds_since() > _STOPS_TOGETHER_S:
            raise signals.stopping()
        if timeout is not None and time.monotonic() - started > timeout:
            raise TimeoutError(
                f"no {folder / 'manifest.json'} after {timeout:g} s: is the rank that runs prepare alive, and the folder shared?"
            )
        time.sleep(poll_seconds)


def _damage(artifact: Artifact) -> list[str]:
    """What has become of the files that later stages read, as far as sizes tell; nothing is known of what an older version prepared."""
    return size_problems(artifact.path, artifact.metrics.get("files", {}))


def _process_start() -> float:
    """When this process began, in seconds since the epoch."""
    after_boot = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + after_boot
