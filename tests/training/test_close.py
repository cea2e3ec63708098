"""An engine that is closed leaves nothing behind: the next stage of a run needs its memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest

from tests.distributed import RankContext, RankPool
from tests.training.engines import bench_of, global_batch, sgd_recipe


def left_behind(ranks: RankContext, stage: int) -> list[str]:
    """What of an engine is still alive after it was closed and let go."""
    recipe = sgd_recipe(deepspeed=f"ds_configs/zero{stage}.json")
    with bench_of(ranks, recipe) as bench:
        bench.engine.train_step(bench.share(global_batch(recipe)), 0.1)
        watched = {"engine": weakref.ref(bench.engine.wrapped), "model": weakref.ref(bench.engine.chunks[0])}
    del bench
    gc.collect()
    return [name for name, reference in watched.items() if reference() is not None]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_closed_engine_is_freed(ranks: Callable[[int], RankPool], stage: int) -> None:
    assert ranks(1).run(left_behind, stage) == [[]]
