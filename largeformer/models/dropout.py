"""Dropout that ends before its training does."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def without_dropout(chunks: Iterable[nn.Module]) -> None:
    """No activation and no attention weight of these modules is dropped from here on. Megatron-core's layers keep the rate as a number."""
    for module in (module for chunk in chunks for module in chunk.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for rate in ("hidden_dropout", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
