"""Integers and their scales as compressed-tensors stores them, which transformers and vLLM read.

The library decides what a scheme means: ranges, rounding, packing, the keys of `quantization_config`. Here its functions are given a few
rows at a time. `o` output and `i` input channels, `g` groups of input channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from largeformer.compression.quantization.schemes import Given, Scheme, library_scheme
from largeformer.errors import BadInputError
from largeformer.export.huggingface import finite
from largeformer.export.streaming import Entry

_SUFFIX = ".weight"


@dataclass(frozen=True)
class Quantization:
    """A scheme, the linear layers that stay as they are, and what is known of the others (`model.layers.0.mlp.up_proj` -> scales).

    Where nothing is given, scales follow from the weights' extremes: round to nearest.
    """

    scheme: Scheme
    ignore: tuple[str, ...] = ("lm_head",)
    given: Mapping[str, Given] = field(default_factory=dict)


class Compressed:
    """Writes linear layers as integers, everything else in `dtype`, in which the scales are as well."""

    def __init__(self, quantization: Quantization, dtype: torch.dtype, shapes: Mapping[str, list[int]]) -> None:
        """shapes: those of all tensors in the folder; raises BadInputError where one of them does not go with the scheme."""
        self._scheme, self._given, self._dtype = quantization.scheme, quantization.given, dtype
        linear = [name.removesuffix(_SUFFIX) for name, shape in shapes.items() if _is_linear(name, shape)]
        self.ignored = [module for module in linear if module in quantization.ignore]
        self.modules = [module for module in linear if module not in quantization.ignore]
        self._check(shapes, quantization.ignore, linear)
        self._library = library_scheme(self._scheme)
        self._rows = {name: shape[0] for name, shape in shapes.items()}
        self._tied = f"lm_head{_SUFFIX}" not in shapes
        self._zero_points: dict[str, list[torch.Tensor]] = {}

    def config(self) -> dict[str, Any]:
        """`quantization_config` of `config.json`."""
        from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        config = QuantizationConfig(
            config_groups={"group_0": self._library},
            format=self._scheme.format,
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=[*self.ignored, *(["lm_head"] if self._tied else [])],  # a tied head has no integers, and clients would look for them
        )
        return config.model_dump(mode="json", exclude_none=True)  # type: ignore[no-any-return]

    def entries(self, name: str, shape: tuple[int, ...]) -> list[Entry]:
        module = name.removesuffix(_SUFFIX)
        if module not in self.modules or not name.endswith(_SUFFIX):
            return [Entry(name, self._dtype, shape)]
        rows, columns = shape
        groups = columns // (self._scheme.group_size or columns)
        made = [Entry(f"{name}_scale", self._dtype, (rows, groups))]
        if self._scheme.format == "int-quantized":
            made.append(Entry(name, torch.int8, shape))
        else:
            packed = -(-columns * self._scheme.bits // 32)
            made += [Entry(f"{name}_packed", torch.int32, (rows, packed)), Entry(f"{name}_shape", torch.int64, (2,))]
            if not self._scheme.symmetric:
                made.append(Entry(f"{name}_zero_point", torch.int32, (-(-rows * self._scheme.bits // 32), groups)))
        if self._scheme.activations == "tensor":
            made.append(Entry(f"{module}.input_scale", self._dtype, (1,)))
        return made

    def encode(self, name: str, part: torch.Tensor, first_row: int) -> Mapping[str, torch.Tensor]:
        module = name.removesuffix(_SUFFIX)
        if module not in self.modules or not name.endswith(_SUFFIX):
            return {name: finite(name, part.to(self._dtype))}
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
        from compressed_tensors.quantization.lifecycle.forward import quantize

        weights, bits, last = finite(name, part.float()), self._scheme.bits, first_row + len(part) == self._rows[name]
        scale, zero_point = self._scales(module, weights, slice(first_row, first_row + len(part)))
        integers = quantize(x=weights, scale=scale.float(), zero_point=zero_point, args=self._library.weights, dtype=torch.int8)
        made = {f"{name}_scale": scale}
        if self._scheme.format == "int-quantized":
            made[name] = integers
        else:
            made[f"{name}_packed"] = pack_to_int32(integers, bits)
            if last:
                made[f"{name}_shape"] = torch.tensor([self._rows[name], part.shape[1]])
        if not self._scheme.symmetric:
            # Eight of them, or four, share an int32 along the rows, so they are packed once all are there.
            held = self._zero_points.setdefault(name, [])
            held.append(zero_point)
            if last:
                made[f"{name}_zero_point"] = pack_to_int32(torch.cat(self._zero_points.pop(name)), bits, packed_dim=0)
        if self._scheme.activations == "tensor" and last:
            given = self._given[module].input_scale
            assert given is not None, "checked before anything was written"
            made[f"{module}.input_scale"] = _positive(f"{module}.input_scale", given.to(self._dtype))
        return made

    def _scales(self, module: str, weights: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales in the folder's dtype and zero points (int8), [rows, g or 1]: those given, else from the extremes of `weights`."""
        given = self._given.get(module)
        if given is not None:
            scale, zero_point = given.scale[rows], given.zero_point[rows] if given.zero_point is not None else None
        else:
            from compressed_tensors.quantization.utils import calculate_qparams

            grouped = weights.unflatten(1, (-1, self._scheme.group_size or weights.shape[1]))
            scale, zero_point = calculate_qparams(*grouped.aminmax(dim=2), self._library.weights)
        scale = _positive(f"{module}.weight_scale", scale.to(self._dtype))
        return scale, (zero_point if zero_point is not None else torch.zeros_like(scale)).round().to(torch.int8)

    def _check(self, shapes: Mapping[str, list[int]], ignore: tuple[str, ...], linear: list[str]) -> None:
        scheme, problems = self._scheme, []
        if scheme.activations and not scheme.symmetric:
            problems.append(
                "integer activations go with symmetric weights alone: no client computes the other; set export.symmetric to true"
            )
        unknown = [name for name in ignore if name not in linear and name != "lm_head"]  # a tied head is no layer of its own
        if unknown:
            problems.append(
                f"export.keep_float names {', '.join(unknown)}; this model's linear layers are named as {', '.join(linear[:3])}"
            )
        size = scheme.group_size
        uneven = [module for module in self.modules if size and shapes[module + _SUFFIX][1] % size]
        if uneven:
            columns = sorted({shapes[module + _SUFFIX][1] for module in uneven})
            problems.append(
                f"export.group_size {size} does not divide {' and '.join(map(str, columns))}, the inputs of {len(uneven)} layers such as "
                f"{uneven[0]}: choose a size that does, or list them in export.keep_float"
            )
        if scheme.activations == "tensor" and (missing := [module for module in self.modules if not _has_input_scale(self._given, module)]):
            problems.append(f"static activations need an input scale of every layer, and {missing[0]} has none: calibrate first")
        if problems:
            raise BadInputError(problems)


def _is_linear(name: str, shape: list[int]) -> bool:
    return name.endswith(_SUFFIX) and len(shape) == 2 and not name.removesuffix(_SUFFIX).endswith(("embed_tokens", "embed_positions"))


def _has_input_scale(given: Mapping[str, Given], module: str) -> bool:
    return module in given and given[module].input_scale is not None


def _positive(name: str, scale: torch.Tensor) -> torch.Tensor:
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise BadInputError(f"{name} holds {scale[~(torch.isfinite(scale) & (scale > 0))][0].item()}: a scale must be finite and above 0")
    return scale
