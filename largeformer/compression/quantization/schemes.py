"""What integers stand for weights, and what compressed-tensors calls that.

The library decides what a scheme means: its ranges, and the scale that follows from extremes. `o` output and `i` input channels, `g` groups
of input channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch

from largeformer.errors import BadInputError

_SHRINKS, _SMALLEST = 80, 0.2  # extremes that the search of `mse` tries, down to a fifth


@dataclass(frozen=True)
class Scheme:
    """What becomes of the linear layers. `group_size` None: one scale for each output channel.

    `activations`: as integers too, with a scale for each token that the client takes, or one for the tensor that calibration found.
    """

    bits: Literal[4, 8]
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["token", "tensor"] | None = None

    @property
    def format(self) -> str:
        """Integers one to a byte where activations are integers too, else packed."""
        return "int-quantized" if self.activations else "pack-quantized"

    @property
    def range(self) -> tuple[int, int]:
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1


@dataclass(frozen=True)
class Given:
    """What calibration found for one linear layer: `scale` and `zero_point` [o, g or 1]; with activations "tensor" `input_scale` [1]."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None


def check_library() -> None:
    """Raises BadInputError where the library is not installed."""
    if find_spec("compressed_tensors") is None:
        raise BadInputError("quantization needs compressed_tensors: install it with pip install 'largeformer[export]'")


def library_scheme(scheme: Scheme) -> Any:
    """The library's `QuantizationScheme` for linear layers."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=scheme.bits,
        symmetric=scheme.symmetric,
        strategy="group" if scheme.group_size else "channel",
        group_size=scheme.group_size,
    )
    activations = {
        None: None,
        "token": {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True},
        "tensor": {"num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False},
    }[scheme.activations]
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=QuantizationArgs(**activations) if activations else None,
        format=scheme.format,
    )


def scale_of(low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Given:
    """Scales and zero points for weights between `low` and `high`, [o, g]: float32, but numbers that `dtype` holds, in which they
    are stored beside the weights. A weight of 0 stays 0."""
    from compressed_tensors.quantization.utils import calculate_qparams

    scale, zero_point = calculate_qparams(low.float(), high.float(), library_scheme(scheme).weights)
    return Given(scale.to(dtype).float(), None if scheme.symmetric else zero_point.float())


def weight_scales(weights: torch.Tensor, scheme: Scheme, dtype: torch.dtype, observer: str = "minmax") -> Given:
    """weights: [o, i]. `minmax`: from the extremes of each channel or group; `mse`: from those extremes shrunk by the factor, of 80 down to
    a fifth, that leaves the smallest squared error."""
    grouped = weights.float().unflatten(1, (-1, scheme.group_size or weights.shape[1]))
    low, high = grouped.aminmax(dim=2)
    if observer == "minmax":
        return scale_of(low, high, scheme, dtype)
    factor, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for step in range(_SHRINKS):
        shrunk = 1.0 - step * (1.0 - _SMALLEST) / _SHRINKS
        given = scale_of(low * shrunk, high * shrunk, scheme, dtype)
        error = (rounded(weights, given, scheme).view_as(grouped) - grouped).square().sum(dim=2)
        factor = torch.where(error < least, shrunk, factor)
        least = torch.minimum(error, least)
    return scale_of(low * factor, high * factor, scheme, dtype)


def rounded(weights: torch.Tensor, given: Given, scheme: Scheme) -> torch.Tensor:
    """The floats that the integers stand for: [o, i] float32 from [o, i]."""
    grouped = weights.float().unflatten(1, (given.scale.shape[1], -1))
    zero_point = given.zero_point[..., None] if given.zero_point is not None else 0.0
    scale = given.scale[..., None]
    integers = (grouped / scale + zero_point).clamp(*scheme.range).round()
    return ((integers - zero_point) * scale).flatten(1)


def token_scales(largest: torch.Tensor) -> torch.Tensor:
    """The scale of 8-bit activations from the largest magnitude of each token, or of all."""
    return (largest.float() / 127.5).clamp_min(torch.finfo(torch.float32).eps)


def rounded_inputs(
    inputs: torch.Tensor, static: torch.Tensor | None = None, largest: Callable[[torch.Tensor], torch.Tensor] = lambda found: found
) -> torch.Tensor:
    """8-bit activations as floats. inputs: [..., i]; static: the scale of all, else there is one for each token. `largest`: makes the
    largest magnitude of a token's channels from that of the channels which are here, [..., 1]."""
    floats = inputs.float()
    scale = static if static is not None else token_scales(largest(floats.abs().amax(dim=-1, keepdim=True)))
    return ((floats / scale).clamp(-128, 127).round() * scale).to(inputs.dtype)
