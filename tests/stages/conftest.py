"""What the tests of stages share; see `tests/one_process.py`."""

import os
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.one_process import one_process

__all__ = ["one_process"]


@pytest.fixture(autouse=True)
def own_world() -> Iterator[None]:
    """A command that ran in this process leaves its world, of one rank, and the variables that name it: no process started here
    may take them for its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if dist.is_initialized():
        dist.destroy_process_group()
