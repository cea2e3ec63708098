"""What lies in a format's files, read back: linear layers by our names, to see whether a pruned weight is still 0.

Integers stand without their scales, but less their zero points: 0 is what computes as 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from largeformer.compression.pruning.sparsity import View
from largeformer.config.schema import ModelConfig
from largeformer.export.onnx import linear_matrices
from largeformer.export.streaming import StoredTensors
from largeformer.models.hf_config import architecture
from largeformer.models.hf_mapping import rows


def hugging_face_weights(folder: Path, model: ModelConfig) -> View:
    """Of a Hugging Face folder: floats, or compressed-tensors' integers."""
    stored = StoredTensors.of_folder(folder)
    settings = json.loads((folder / "config.json").read_text()).get("quantization_config")
    bits = settings["config_groups"]["group_0"]["weights"]["num_bits"] if settings else 0
    table = {row.ours: row for row in rows(model, architecture(model).style)}

    def read(name: str) -> torch.Tensor:
        row = table[name]
        return row.form.join(tuple(_whole(stored, theirs, bits) for theirs in row.theirs), model)

    return View(list(table), read)


def _whole(stored: StoredTensors, name: str, bits: int) -> torch.Tensor:
    if f"{name}_packed" not in stored.names:
        return stored.read(name).float()
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    size, groups = stored.read(f"{name}_shape").tolist(), stored.shape(f"{name}_scale")[1]
    integers = unpack_from_int32(stored.read(f"{name}_packed"), bits, torch.Size(size)).float()
    if f"{name}_zero_point" not in stored.names:
        return integers
    zero_point = unpack_from_int32(stored.read(f"{name}_zero_point"), bits, torch.Size([size[0], groups]), packed_dim=0)
    return (integers.unflatten(1, (groups, -1)) - zero_point[..., None]).flatten(1)


def onnx_weights(file: Path, float_file: Path, model: ModelConfig) -> View:
    """Of the float file, or of the integers that were made of it."""
    import onnx
    from onnx import numpy_helper

    held = {initializer.name: initializer for initializer in onnx.load(str(file)).graph.initializer}
    matrices, table = linear_matrices(float_file), {row.ours: row for row in rows(model, "llama")}

    def array(name: str) -> torch.Tensor:
        return torch.from_numpy(numpy_helper.to_array(held[name]).copy()).float()

    def matrix(module: str) -> torch.Tensor:
        name = matrices[module]
        return array(name).t() if name in held else (array(f"{name}_quantized") - array(f"{name}_zero_point")).t()

    def read(name: str) -> torch.Tensor:
        row = table[name]
        return row.form.join(tuple(matrix(theirs.removesuffix(".weight")) for theirs in row.theirs), model)

    return View(list(table), read)
