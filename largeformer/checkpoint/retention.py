"""Which checkpoints are kept.

Only valid ones count, by their sizes: so the last valid checkpoint is never deleted for a damaged newer one. What is damaged is left for a
person to look at.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from largeformer.checkpoint.commit import DROPPED, committed, step_of
from largeformer.checkpoint.verify import quick_problems


@dataclass(frozen=True)
class Policy:
    """Keep the newest `keep_last`; every one whose step is a multiple of `keep_every`; the `keep_best` by validation `metric`, of which
    the smallest is best, or the largest where `mode` is "max"."""

    keep_last: int
    keep_every: int | None = None
    keep_best: int = 0
    metric: str = "val_loss"
    mode: str = "min"


@dataclass(frozen=True)
class Entry:
    """`value`: the metric of a validation at this very step; None where there was none."""

    path: Path
    step: int
    value: float | None


def drop_old(folder: Path, policy: Policy) -> list[Path]:
    """Take their names from the checkpoints that the policy does not keep; call after a new one is committed. Returns the folders, which
    are no checkpoints any more and are to be deleted."""
    entries = [Entry(path, step_of(path), _metric(path, policy.metric)) for path in committed(folder) if not quick_problems(path)]
    kept = kept_steps(entries, policy)
    # Renamed first, so that no half-deleted folder carries a checkpoint's name.
    return [entry.path.rename(entry.path.with_name(f"{entry.path.name}{DROPPED}")) for entry in entries if entry.step not in kept]


def kept_steps(entries: Sequence[Entry], policy: Policy) -> set[int]:
    """`entries` from the oldest to the newest."""
    kept = {entry.step for entry in entries[-policy.keep_last :]}
    if policy.keep_every is not None:
        kept |= {entry.step for entry in entries if entry.step % policy.keep_every == 0}
    sign = 1 if policy.mode == "min" else -1
    # Of equals the newer is better: it has seen more.
    ranked = sorted((sign * entry.value, -entry.step) for entry in entries if entry.value is not None)
    return kept | {-step for _, step in ranked[: policy.keep_best]}


def _metric(checkpoint: Path, metric: str) -> float | None:
    try:
        validation = json.loads((checkpoint / "state.json").read_bytes())["validation"]
        return float(validation[metric]) if validation["step"] == step_of(checkpoint) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
