"""What a stage finds in the world that it enters."""

import pytest
from torch.utils._python_dispatch import _get_current_dispatch_mode

from largeformer.parallel import cpu_products
from largeformer.parallel.cpu_products import Bf16ProductsInFp32
from largeformer.stages.common.world import enter_world
from tests.recipes import tiny_recipe


@pytest.mark.parametrize(
    "precision, has, converts",
    [
        pytest.param("bf16", False, True, id="bf16 on a CPU without it"),
        pytest.param("bf16", True, False, id="bf16 on a CPU with it"),
        pytest.param("fp32", False, False, id="fp32"),
    ],
)
def test_products_of_bf16_are_converted_where_the_cpu_needs_it(monkeypatch, precision, has, converts):
    monkeypatch.setattr(cpu_products, "has_bf16", lambda: has)
    with enter_world(tiny_recipe(train={"precision": precision}), training=False):
        assert isinstance(_get_current_dispatch_mode(), Bf16ProductsInFp32) is converts
    assert _get_current_dispatch_mode() is None
