"""What every test may ask for: pools of gloo ranks, and the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.distributed import PoolCache, RankPool

# Before any test imports DeepSpeed or W&B: both decide at import. A test that needs a GPU says so by its marker.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("DS_BUILD_OPS", "0")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)`: the session's pool of n gloo ranks; `ranks(n).run(function, *args)` returns the results by rank."""
    pools = PoolCache()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real text that `LARGEFORMER_DATA` names; the test is skipped where it is not set."""
    folder = os.environ.get("LARGEFORMER_DATA")
    if not folder:
        pytest.skip("LARGEFORMER_DATA is not set: it names the folder of real data")
    path = Path(folder)
    assert path.is_dir(), f"LARGEFORMER_DATA {folder} is not a folder"
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where no GPU is visible. LARGEFORMER_GPU_TESTS_ON_CPU=1 runs them there all the same, to try
    their code."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked or os.environ.get("LARGEFORMER_GPU_TESTS_ON_CPU") == "1":
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no GPU is visible"))
