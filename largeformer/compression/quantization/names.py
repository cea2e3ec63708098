"""Hugging Face's names of what our linear layers hold: `linear_qkv` is three of theirs, a gated `linear_fc1` two.

The names are Llama's for every shape, which `models/plain.py` and with it ONNX uses too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from largeformer.compression.linears import Linear
from largeformer.config.schema import ModelConfig
from largeformer.models.hf_mapping import rows

_WEIGHT = ".weight"


class Names:
    """For one shape of model."""

    def __init__(self, model: ModelConfig) -> None:
        self._model = model
        self._rows = {row.ours: row for row in rows(model, "llama")}

    def of(self, linear: Linear) -> list[str]:
        """Their modules, such as `model.layers.0.self_attn.q_proj`, in their order."""
        return [name.removesuffix(_WEIGHT) for key in linear.keys for name in self._rows[key].theirs]

    def cut(self, linear: Linear, whole: torch.Tensor) -> dict[str, torch.Tensor]:
        """[o, ...], in the order of our rows -> the rows of each of theirs."""
        sizes = [shard.global_shape[0] for shard in linear.shards]
        made: dict[str, torch.Tensor] = {}
        for key, part in zip(linear.keys, whole.split(sizes), strict=True):
            row = self._rows[key]
            cut = row.form.cut(part, self._model)
            made |= {name.removesuffix(_WEIGHT): tensor.contiguous() for name, tensor in zip(row.theirs, cut, strict=True)}
        return made

    def join(self, linear: Linear, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rows of each of theirs -> [o, ...], in the order of our rows: `cut` undone."""
        forms = [self._rows[key] for key in linear.keys]
        joined = [row.form.join(tuple(parts[name.removesuffix(_WEIGHT)] for name in row.theirs), self._model) for row in forms]
        return torch.cat(joined)

    def all(self, linears: Sequence[Linear]) -> list[str]:
        return [name for linear in linears for name in self.of(linear)]
