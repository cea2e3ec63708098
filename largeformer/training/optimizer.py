"""The optimizer that DeepSpeed's engine drives, over two parameter groups: matrices, which decay, and the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from largeformer.config.schema import OptimizerConfig
from largeformer.errors import BadInputError


def build_optimizer(config: OptimizerConfig, parameters: Iterable[torch.nn.Parameter], offloaded: bool) -> torch.optim.Optimizer:
    """AdamW (decoupled decay, Loshchilov and Hutter 2019), Adam (decay added to the gradient) or SGD with momentum.

    `offloaded`: ZeRO keeps the optimizer's state on the CPU or on NVMe. Call before `deepspeed.initialize`, while every
    parameter still has its shape. Raises BadInputError where the backend cannot update parameters on their device.
    """
    groups = parameter_groups(parameters, config.weight_decay)
    if config.backend == "deepspeed_cpu" and not offloaded and any(one.device.type != "cpu" for group in groups for one in group["params"]):
        raise BadInputError(
            "optimizer.backend deepspeed_cpu updates on the CPU, and this model trains on a GPU: set it to auto, or offload the optimizer "
            "(deepspeed=zero2_offload_cpu)"
        )
    adam: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    backend = resolve_backend(config, offloaded)
    if config.type == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=backend == "torch_fused" or None)
    decoupled = config.type == "adamw"
    if backend == "deepspeed_cpu":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **adam)  # type: ignore[no-any-return]
    if backend == "deepspeed_fused":
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=decoupled, **adam)  # type: ignore[no-any-return]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=backend == "torch_fused" or None, **adam)


def resolve_backend(config: OptimizerConfig, offloaded: bool) -> str:
    """What `auto` means: DeepSpeed's CPU Adam where the state is offloaded, else PyTorch's fused kernels."""
    if config.backend != "auto":
        return config.backend
    if offloaded:
        return "deepspeed_cpu" if config.type != "sgd" else "torch"
    return "torch_fused"


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices (two or more dimensions) with `weight_decay`, biases and norms without."""
    matrices: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
