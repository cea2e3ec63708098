"""Where a run comes from: the commit of the code around it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

_SECONDS = 10


def git_state(folder: Path) -> dict[str, Any] | None:
    """`commit`, and whether tracked files differ from it (`dirty`), of the repository that `folder` lies in; None outside of one.

    Neither remote addresses, which may hold passwords, nor the difference itself are read.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
