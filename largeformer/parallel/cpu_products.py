"""Matrix products in bf16 on a CPU that has no instructions for them.

PyTorch computes these one number at a time there, a hundred times slower than in fp32. The product of two bf16 numbers is exact in
fp32, and hardware that multiplies bf16 sums in fp32 as well and rounds once; so the operands are widened, and the result is rounded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.linear, _aten._scaled_dot_product_flash_attention_for_cpu_backward)
)


def products_for(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within, products in `precision` are as fast as `device` allows, in this thread and in the backward passes that it starts."""
    return Bf16ProductsInFp32() if converts(precision, device) else contextlib.nullcontext()  # type: ignore[no-untyped-call]


def converts(precision: str, device: torch.device) -> bool:
    """Whether products in `precision` are computed in another one on `device`."""
    return precision == "bf16" and device.type == "cpu" and not has_bf16()


def has_bf16() -> bool:
    """Whether PyTorch has kernels that multiply bf16 matrices on this CPU (on x86 they need AVX-512)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Bf16ProductsInFp32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every matrix product of bf16 tensors in fp32, rounded to bf16."""

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        operation = getattr(func, "overloadpacket", None)
        if operation not in _PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out = kwargs.pop("out", None)
        wide = tree_map_only(torch.Tensor, lambda tensor: tensor.float(), args)
        products = operation(*wide, **kwargs)
        if out is not None:
            return out.copy_(products)
        return tree_map_only(torch.Tensor, lambda product: product.to(torch.bfloat16), products)
