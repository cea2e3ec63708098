"""Steps that must not be taken: how DeepSpeed's optimizers are told so, and the gradients that their norm leaves out.

The norm of all gradients is reduced over the world before any weight moves, and a NaN or an infinity anywhere makes it one; DeepSpeed's
ZeRO optimizers then skip on every rank alike. Two things escape it: the loss, and gradients that are left out of the norm because
another tensor-parallel rank counts the same parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from largeformer.parallel.groups import ParallelGroups


@dataclass
class Refusal:
    """Whether the step that comes next must be skipped; the same on every rank."""

    refused: bool = False


def let_refuse(optimizer: Any, refusal: Refusal) -> None:
    """Make `optimizer.step` do what it does at an overflow wherever `refusal` says so: drop the gradients, and change nothing else.

    Each optimizer of DeepSpeed 0.19.8 asks at another place. Those places also look at every gradient for infinities in 16-bit
    runs, which the norm that follows sees as well: outside fp16 that pass is saved.
    """
    if hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # ZeRO 3
        scan = optimizer._overflow_check_and_loss_scale_update

        def check(update_scale: bool = True) -> bool:
            optimizer.overflow = scan(update_scale) or refusal.refused
            return bool(optimizer.overflow)

        optimizer._overflow_check_and_loss_scale_update = check
    elif hasattr(optimizer, "has_overflow"):  # ZeRO 1 and 2
        look = optimizer.has_overflow if optimizer.dtype == torch.float16 else lambda partition_gradients=True: False
        optimizer.check_grad_overflow = True
        optimizer.has_overflow = lambda partition_gradients=True: refusal.refused or look(partition_gradients)
    elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO 1 in bf16 with float32 accumulation
        gradients = optimizer.get_grads_for_norm

        def invalid_or_real(for_clipping: bool = False) -> Any:
            return ([torch.tensor(torch.nan)], {}) if refusal.refused else gradients(for_clipping)

        optimizer.get_grads_for_norm = invalid_or_real
    else:
        step = optimizer.step

        def step_unless_refused(closure: None = None) -> None:
            optimizer.overflow = refusal.refused  # what DeepSpeed's engine reads afterwards
            if not refusal.refused:
                step()

        optimizer.step = step_unless_refused


class UncountedGradients:
    """Watches the gradients of the parameters that tensor-parallel ranks share, on the ranks where they do not count in the norm.

    They are few and small: norms, biases, position embeddings. A second copy of a tied embedding needs no watching: its gradient
    is summed with the first one's.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], groups: ParallelGroups) -> None:
        self._sum: torch.Tensor | None = None
        if groups.coordinates.tensor == 0:
            return
        for chunk in chunks:
            for parameter in chunk.parameters():
                counted = getattr(parameter, "tensor_model_parallel", False) or getattr(parameter, "ds_pipe_replicated", False)
                if parameter.requires_grad and not counted:
                    parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def finite(self) -> bool:
        """Whether all gradients since the last call were. A sum of finite float32 numbers this large would be no gradient either."""
        seen, self._sum = self._sum, None
        return seen is None or bool(torch.isfinite(seen))

    def _add(self, gradient: torch.Tensor) -> None:
        part = gradient.detach().sum(dtype=torch.float32)
        self._sum = part if self._sum is None else self._sum + part
