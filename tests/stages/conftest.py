"""What the tests of stages share; see `tests/one_process.py`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

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
