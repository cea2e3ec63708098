"""The pool of ranks itself: results by rank, failures with their tracebacks, hangs that end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from tests.distributed import PoolCache, RankContext, RankFailure, RankPool


def total(ranks: RankContext, value: float) -> tuple[float, int]:
    import torch

    tensor = torch.tensor(value * (ranks.rank + 1))
    torch.distributed.all_reduce(tensor)
    return tensor.item(), os.getpid()


def raise_on_one(ranks: RankContext) -> None:
    import torch

    if ranks.rank == 1:
        raise LookupError("rank one is missing its key")
    torch.distributed.barrier()


def hang_on_one(ranks: RankContext) -> None:
    import threading

    if ranks.rank == 1:
        threading.Event().wait()


def die_on_one(ranks: RankContext) -> None:
    if ranks.rank == 1:
        os._exit(7)


def what_is_there(ranks: RankContext) -> tuple[bool, str | None]:
    return "deepspeed" in sys.modules and "megatron.core" in sys.modules, os.environ.get("OF_THIS_TEST")


def loader_sum(ranks: RankContext) -> int:
    from torch.utils.data import DataLoader

    return sum(int(batch.sum()) for batch in DataLoader(range(10), batch_size=5, num_workers=1))


def test_ranks_meet_and_are_kept(ranks: Callable[[int], RankPool]) -> None:
    first = ranks(2).run(total, 10.0)
    second = ranks(2).run(total, 1.0)
    assert [value for value, _ in first + second] == [30.0, 30.0, 3.0, 3.0]
    assert [pid for _, pid in first] == [pid for _, pid in second], "the second case ran in the processes of the first"


def test_ranks_are_born_with_their_imports_and_the_environment_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("first", None):
        monkeypatch.setenv("OF_THIS_TEST", value) if value else monkeypatch.delenv("OF_THIS_TEST")
        with RankPool(1) as pool:
            assert pool.run(what_is_there) == [(True, value)]


def test_a_rank_may_have_children(ranks: Callable[[int], RankPool]) -> None:
    assert ranks(2).run(loader_sum) == [45, 45]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param(raise_on_one, "LookupError: rank one is missing its key", id="exception"),
        pytest.param(hang_on_one, "in hang_on_one", id="hang"),
        pytest.param(die_on_one, "exit code 7", id="death"),
    ],
)
def test_failure_is_told_and_the_pool_recovers(case: Callable[[RankContext], None], message: str) -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankFailure, match=message) as failure:
            pool.run(case, timeout=3.0)
        assert "rank 1 of 2" in str(failure.value)
        assert [value for value, _ in pool.run(total, 1.0)] == [3.0, 3.0]


def test_cache_closes_the_pool_used_longest_ago() -> None:
    pools = PoolCache(most_ranks=5)
    one, two = pools(1), pools(2)
    assert pools(1) is one
    pools(3)
    assert pools(1) is one
    assert pools(2) is not two
