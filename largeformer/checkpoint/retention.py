"""Which checkpoints are kept."""

from __future__ import annotations

import shutil
from pathlib import Path

from largeformer.checkpoint.commit import committed


def drop_old(folder: Path, keep_last: int) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints; call after a new one is committed. Returns what was deleted."""
    old = committed(folder)[:-keep_last]
    for path in old:
        # Renamed first, so that no half-deleted folder carries a checkpoint's name.
        doomed = path.rename(path.with_suffix(".old"))
        shutil.rmtree(doomed, ignore_errors=True)
    return old
