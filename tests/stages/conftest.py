"""What the tests of stages share; see `tests/one_process.py`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from largeformer.training.anomalies import LossSpikes
from tests.one_process import one_process

__all__ = ["one_process"]


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_world() -> Iterator[None]:
    """A command that ran in this process leaves its world, of one rank, and the variables that name it: no process started here
    may take them for its own."""
    with _nothing_left_behind():
        yield


@pytest.fixture(scope="module", autouse=True)
def own_world_of_a_module() -> Iterator[None]:
    """The same of commands that a module's own fixtures ran."""
    with _nothing_left_behind():
        yield


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """At which steps of a process, in this order, the loss is a spike."""
    wanted: list[int] = []
    steps = iter(range(1, 1000))
    score = LossSpikes.score

    def scored(self: LossSpikes, loss: float) -> float:
        z = score(self, loss)
        return 99.0 if next(steps) in wanted else z

    monkeypatch.setattr(LossSpikes, "score", scored)
    return wanted
