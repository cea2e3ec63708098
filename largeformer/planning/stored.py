"""What checkpoints take on disk: bytes of a parameter in one, and how many are kept."""

from __future__ import annotations

import math

from largeformer.config.schema import Recipe
from largeformer.planning.states import FULL, moment_bytes


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes a parameter: its weight, its float32 master where the weight is none itself, and the optimizer's moments."""
    weights = FULL if recipe.train.precision == "fp32" else 2 + FULL
    return weights + moment_bytes(recipe.optimizer)


def kept_checkpoints(recipe: Recipe) -> int:
    """The most that lie there at the end: the newest, the best, and of all steps that are saved those that `keep_every` keeps. One may
    count twice."""
    settings = recipe.checkpoint
    kept = settings.keep_last + settings.keep_best
    if settings.keep_every is not None and settings.save_interval is not None:
        kept += recipe.train.train_iters // math.lcm(settings.keep_every, settings.save_interval)
    return kept
