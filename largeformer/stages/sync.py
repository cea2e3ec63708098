"""`sync`: send runs that were recorded offline to W&B, by W&B's own `wandb sync`."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from largeformer.errors import BadInputError

_SILENT_S = 600.0  # a run that has written nothing for so long has been killed


def run(folders: Sequence[Path], *, online: bool = False, again: bool = False, dry_run: bool = False) -> int:
    """Send the offline runs under `folders` (run, stage or `wandb` folders); processes of one run in the order in which they began.

    `online` sends also those that were recorded online, for an upload that was cut off; `again` also those sent before. Returns 0 once
    all are sent, 1 where W&B could not send one. Raises BadInputError for a folder without such runs, and without a key.
    """
    from largeformer.tracking.wandb_login import login_problems

    problems, found = [], []
    for folder in folders:
        here = recorded_runs(folder, online)
        if not here:
            problems.append(f"{folder} holds no offline run of W&B (wandb/offline-run-...): name a run's output folder")
        found += here
    unsent = [path for path in dict.fromkeys(found) if again or not is_sent(path)]
    waiting = [path for path in unsent if not is_being_written(path)]
    if waiting and not dry_run:
        problems += login_problems("online")
    if problems:
        raise BadInputError(problems)
    for path in unsent:
        print(path if path in waiting else f"{path} is still being written (or was killed a moment ago): send it later")
    if not waiting or dry_run:
        before = len(found) - len(unsent)
        print(f"{len(waiting)} of {len(found)} offline runs wait to be sent" if waiting else f"nothing to send: {before} sent before")
        return 0
    for path in waiting:
        _note(path)
    options = ["--include-synced", *(["--include-online"] if online else [])]
    command = [sys.executable, "-m", "wandb", "sync", *options, *(str(path.resolve()) for path in waiting)]
    # It makes a folder for its own logs where it runs.
    code = subprocess.run(command, check=False, cwd=waiting[0].absolute().parent.parent).returncode
    left = [path for path in waiting if not is_sent(path)]
    print(f"{len(waiting) - len(left)} of {len(waiting)} sent" + (f"; not sent: {', '.join(map(str, left))}" if left else ""))
    return 1 if code or left else 0


def recorded_runs(folder: Path, online: bool = False) -> list[Path]:
    """The folders `offline-run-<time>-<id>` at or under `folder`, in the order of their begin; with `online` also `run-<time>-<id>`.
    A run of ours may be named so too: a recording holds a file of W&B's, or the mark of one that was sent."""
    kinds = ("offline-run-", "run-") if online else ("offline-run-",)
    if folder.absolute().name.startswith(kinds) and _is_recording(folder):
        return [folder.absolute()]
    here = [
        path for kind in kinds for place in ("", "wandb/", "*/wandb/") for path in folder.glob(f"{place}{kind}*") if _is_recording(path)
    ]
    return sorted(here, key=lambda path: path.name.removeprefix("offline-"))


def _is_recording(folder: Path) -> bool:
    return any(path.is_file() for ending in ("", ".synced") for path in folder.glob(f"*.wandb{ending}"))


def is_sent(run_folder: Path) -> bool:
    """W&B leaves a mark beside a file that it has sent. What was written after that is not sent."""
    return any(not (file := mark.with_suffix("")).exists() or _time(mark) >= _time(file) for mark in run_folder.glob("*.wandb.synced"))


def is_being_written(run_folder: Path) -> bool:
    """Whether the process that writes it has not said that it was done, and wrote not long ago: W&B would take what is there for all."""
    from largeformer.tracking.wandb_file import has_ended

    fresh = any(time.time() - _time(file) < _SILENT_S for file in run_folder.glob("*.wandb"))
    return fresh and not has_ended(run_folder)


def _time(path: Path) -> float:
    return path.stat().st_mtime


def _note(run_folder: Path) -> None:
    """How far the run was logged, for a process that goes on with it where this folder is gone."""
    from largeformer.tracking.wandb_file import note, recorded

    stage, run_id = run_folder.absolute().parent.parent, run_folder.name.rpartition("-")[2]
    note(stage, run_id, *recorded(stage, run_id))
