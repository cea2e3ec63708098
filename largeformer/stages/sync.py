"""`sync`: send runs that were recorded offline to W&B, by W&B's own `wandb sync`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from largeformer.errors import BadInputError


def run(folders: Sequence[Path], *, again: bool = False, dry_run: bool = False) -> int:
    """Send the offline runs under `folders` (run, stage or `wandb` folders); processes of one run in the order in which they began.

    `again` sends also those that were sent before. Returns 0 once all are sent, 1 where W&B could not send one.
    Raises BadInputError for a folder without such runs, and without a key.
    """
    from largeformer.tracking.wandb_login import login_problems

    problems, found = [], []
    for folder in folders:
        here = offline_runs(folder)
        if not here:
            problems.append(f"{folder} holds no offline run of W&B (wandb/offline-run-...): name a run's output folder")
        found += here
    waiting = [path for path in dict.fromkeys(found) if again or not is_sent(path)]
    if waiting and not dry_run:
        problems += login_problems("online")
    if problems:
        raise BadInputError(problems)
    for path in waiting:
        print(path)
    if not waiting or dry_run:
        print(f"{len(waiting)} of {len(found)} offline runs wait to be sent" if waiting else f"nothing to send: {len(found)} sent before")
        return 0
    command = [sys.executable, "-m", "wandb", "sync", *(["--include-synced"] if again else []), *(str(path.resolve()) for path in waiting)]
    # It makes a folder for its own logs where it runs.
    code = subprocess.run(command, check=False, cwd=waiting[0].parent.parent).returncode
    left = [path for path in waiting if not is_sent(path)]
    print(f"{len(waiting) - len(left)} of {len(waiting)} sent" + (f"; not sent: {', '.join(map(str, left))}" if left else ""))
    return 1 if code or left else 0


def offline_runs(folder: Path) -> list[Path]:
    """The folders `offline-run-<time>-<id>` at or under `folder`, in the order in which they began."""
    if folder.name.startswith("offline-run-") and folder.is_dir():
        return [folder]
    here = [path for pattern in ("", "wandb/", "*/wandb/") for path in folder.glob(f"{pattern}offline-run-*") if path.is_dir()]
    return sorted(here, key=lambda path: path.name)


def is_sent(run_folder: Path) -> bool:
    """W&B leaves a mark beside a file that it has sent whole."""
    return any(run_folder.glob("*.wandb.synced"))
