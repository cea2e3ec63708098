"""A folder that Hugging Face's transformers opens, written from a checkpoint's files one tensor at a time.

config.json  generation_config.json  model.safetensors (or shards and their index)
tokenizer.json  tokenizer_config.json  tokenizer.model          (`export/tokenizer.py`)
README.md                                                       (`export/card.py`)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from largeformer.artifact import write_atomically
from largeformer.config.schema import ModelConfig
from largeformer.errors import BadInputError
from largeformer.export.streaming import PART_BYTES, Entry, ShardedWriter, StoredTensors
from largeformer.models.hf_config import architecture, hugging_face_config
from largeformer.models.hf_mapping import Row, rows, shapes, zeros


class Encoder(Protocol):
    """How one tensor of theirs is stored: as it is, or as integers with their scales."""

    def entries(self, name: str, shape: tuple[int, ...]) -> list[Entry]:
        """The tensors that stand for it in the files."""

    def encode(self, name: str, part: torch.Tensor, first_row: int) -> Mapping[str, torch.Tensor]:
        """The rows of those tensors that the rows `part`, from `first_row` on, turn into."""


@dataclass(frozen=True)
class Plain:
    """Floats in one dtype."""

    dtype: torch.dtype

    def entries(self, name: str, shape: tuple[int, ...]) -> list[Entry]:
        return [Entry(name, self.dtype, shape)]

    def encode(self, name: str, part: torch.Tensor, first_row: int) -> Mapping[str, torch.Tensor]:
        return {name: finite(name, part.to(self.dtype))}


def finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`; raises BadInputError where it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise BadInputError(
            f"{name} is not finite in {str(tensor.dtype).removeprefix('torch.')}: export a checkpoint from before it diverged, or, where "
            "export.dtype is fp16, which holds no number above 65504, choose bf16"
        )
    return tensor


def write_weights(source: StoredTensors, model: ModelConfig, vocab_size: int, encoder: Encoder, folder: Path, max_shard_bytes: int) -> int:
    """Write the checkpoint's weights under their names into `folder`, in memory of about the largest tensor. Returns the bytes.

    Raises BadInputError where the checkpoint is not of this shape, or holds a weight that is not finite.
    """
    table = rows(model, architecture(model).style)
    theirs = shapes(table, model, vocab_size)
    entries = [entry for name, shape in theirs.items() for entry in encoder.entries(name, tuple(shape))]
    entries += [entry for name, size in zeros(model).items() for entry in encoder.entries(name, (size,))]
    with ShardedWriter(folder, entries, max_shard_bytes) as writer:
        for row in table:
            expected = sum(_elements(theirs[name]) for name in row.theirs)
            if math.prod(source.shape(row.ours)) != expected:
                raise BadInputError(f"{source.folder} holds {row.ours} of shape {list(source.shape(row.ours))}, which is not this model's")
            _write_in_parts(source.read(row.ours), row, model, encoder, writer)
        for name, size in zeros(model).items():
            for stored, tensor in encoder.encode(name, torch.zeros(size), 0).items():
                writer.append(stored, tensor)
    return writer.total_bytes


def _write_in_parts(tensor: torch.Tensor, row: Row, model: ModelConfig, encoder: Encoder, writer: ShardedWriter) -> None:
    """A function of its own: the last part would keep the tensor in memory while the next is read."""
    written = dict.fromkeys(row.theirs, 0)
    for parts in row.form.cut_in_parts(tensor, model, PART_BYTES // tensor.element_size()):
        for name, part in zip(row.theirs, parts, strict=True):
            for stored, rows_of_it in encoder.encode(name, part, written[name]).items():
                writer.append(stored, rows_of_it)
            written[name] += part.shape[0]


def _elements(shape: list[int]) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class SpecialIds:
    """Ids that clients must know; None where the tokenizer has none. `ends`: further ones that end an answer."""

    eos: int | None
    bos: int | None = None
    pad: int | None = None
    ends: tuple[int, ...] = ()

    def keys(self) -> dict[str, int]:
        named = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        return {name: value for name, value in named.items() if value is not None}

    def generation_keys(self) -> dict[str, Any]:
        """As `generation_config.json` has them: all that end an answer, where they are several."""
        ends = list(dict.fromkeys(i for i in (self.eos, *self.ends) if i is not None))
        return {"_from_model_config": True, **self.keys()} if len(ends) < 2 else {**self.keys(), "eos_token_id": ends}


def write_configs(
    model: ModelConfig, vocab_size: int, dtype: torch.dtype, ids: SpecialIds, folder: Path, quantization: Mapping[str, Any] | None = None
) -> None:
    """`config.json` and `generation_config.json`. Ids that the tokenizer lacks are written as null: else a client takes its own."""
    nulls = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = {
        **hugging_face_config(model, vocab_size),
        **nulls,
        **ids.keys(),
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **({"quantization_config": dict(quantization)} if quantization else {}),
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", ids.generation_keys())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
