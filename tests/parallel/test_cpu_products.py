"""Products in bf16 on CPUs without instructions for them: what float64 gives, rounded once, forward and backward."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from largeformer.parallel import cpu_products
from largeformer.parallel.cpu_products import Bf16ProductsInFp32, products_for


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


class Computed(TorchDispatchMode):
    """Around the conversion: the dtypes in which products are computed in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in cpu_products._PRODUCTS:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


PRODUCTS = {
    "mm": (torch.mm, [_bf16(5, 96), _bf16(96, 7)]),
    "bmm": (torch.bmm, [_bf16(3, 5, 96), _bf16(3, 96, 7)]),
    "addmm": (torch.addmm, [_bf16(7), _bf16(5, 96), _bf16(96, 7)]),
    "baddbmm": (torch.baddbmm, [_bf16(3, 5, 7), _bf16(3, 5, 96), _bf16(3, 96, 7)]),
    "linear with a bias": (F.linear, [_bf16(2, 5, 96), _bf16(7, 96), _bf16(7)]),
    "matmul of 4-d tensors": (torch.matmul, [_bf16(2, 3, 5, 96), _bf16(2, 3, 96, 7)]),
}


@pytest.mark.parametrize("product, operands", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_and_its_gradients_are_float64s_rounded_once(product, operands):
    leaves = [operand.clone().requires_grad_() for operand in operands]
    wide = [operand.double().requires_grad_() for operand in operands]
    expected = product(*wide)
    slope = _bf16(*expected.shape)
    expected.backward(slope.double())
    with Computed() as computed, Bf16ProductsInFp32():
        found = product(*leaves)
        found.backward(slope)
    assert computed.dtypes == {torch.float32}
    for ours, reference in zip([found, *(leaf.grad for leaf in leaves)], [expected, *(leaf.grad for leaf in wide)], strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), reference.double(), rtol=2**-8, atol=1e-5)


def test_a_product_may_be_written_into_a_tensor():
    left, right = _bf16(5, 96), _bf16(96, 7)
    out = torch.zeros(10, 7, dtype=torch.bfloat16)
    with Computed() as computed, Bf16ProductsInFp32():
        returned = torch.mm(left, right, out=out[5:])
    assert computed.dtypes == {torch.float32}
    assert returned.data_ptr() == out[5:].data_ptr() and not out[:5].any()
    torch.testing.assert_close(out[5:].double(), left.double() @ right.double(), rtol=2**-8, atol=1e-5)


def test_attention_has_the_gradients_of_fp32():
    def gradients(dtype: torch.dtype, mode: contextlib.AbstractContextManager) -> list[torch.Tensor]:
        leaves = [_bf16(2, heads, 64, 16).to(dtype).requires_grad_() for heads in (4, 4, 4)]
        with mode:
            F.scaled_dot_product_attention(*leaves, is_causal=True).sum().backward()
        return [leaf.grad for leaf in leaves]

    found, expected = gradients(torch.bfloat16, Bf16ProductsInFp32()), gradients(torch.float32, contextlib.nullcontext())
    for ours, reference in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), reference, rtol=2e-2, atol=2e-2)


def test_other_dtypes_are_left_alone():
    left, right = torch.randn(5, 96), torch.randn(96, 7)
    with Bf16ProductsInFp32():
        assert torch.equal(left @ right, torch.mm(left, right))
        assert (left.double() @ right.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "precision, device, has, converts",
    [
        pytest.param("bf16", "cpu", False, True, id="a CPU without bf16"),
        pytest.param("bf16", "cpu", True, False, id="a CPU with bf16"),
        pytest.param("fp32", "cpu", False, False, id="fp32"),
        pytest.param("bf16", "cuda", False, False, id="a GPU"),
    ],
)
def test_only_bf16_on_a_cpu_without_it_is_converted(monkeypatch, precision, device, has, converts):
    monkeypatch.setattr(cpu_products, "has_bf16", lambda: has)
    assert isinstance(products_for(precision, torch.device(device)), Bf16ProductsInFp32) is converts
