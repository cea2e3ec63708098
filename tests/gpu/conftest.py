"""A world of one rank in the test process, on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from largeformer.launching.local import free_port, rank_environ
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import join_world


@pytest.fixture(scope="package")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """The GPU, joined as rank 0 of 1. With LARGEFORMER_GPU_TESTS_ON_CPU=1 and no GPU it is the CPU: the same code, but proof of nothing
    that only a GPU can show."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in rank_environ({}, 0, 1, free_port()).items():
            patch.setenv(name, value)
        chosen = prepare_device(0)
        join_world(0, 1, f"file://{tmp_path_factory.mktemp('world')}/store", chosen)
        yield chosen
        dist.destroy_process_group()
