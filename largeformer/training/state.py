"""The engine's state in the parameters' own terms, whatever ZeRO did to it. All functions here are collective over data parallel."""

from __future__ import annotations

from typing import Any

import torch


def full_gradient(wrapped: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """float32 gradient of this rank's shard of `parameter`, averaged over data parallel; valid between backward and step."""
    if wrapped.zero_optimization_stage() == 0:
        assert parameter.grad is not None
        return parameter.grad.float()
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter).float()  # type: ignore[no-any-return]


def full_value(wrapped: Any, parameter: torch.nn.Parameter) -> torch.Tensor:
    """float32 value of this rank's shard of `parameter`: the optimizer's master where there is one."""
    if wrapped.zero_optimization_stage() == 0:
        return parameter.detach().float()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).float()  # type: ignore[no-any-return]
