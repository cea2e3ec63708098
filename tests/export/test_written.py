"""What is read back from an export's files is what was written: the same weights, or integers that are 0 where these are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from largeformer.compression.pruning.sparsity import linear_weights, zeros_lost
from largeformer.compression.quantization.schemes import Scheme
from largeformer.export import onnx
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.huggingface import Plain, SpecialIds, write_configs, write_weights
from largeformer.export.streaming import StoredTensors
from largeformer.export.written import hugging_face_weights, onnx_weights
from largeformer.models.hf_mapping import from_hugging_face, rows, shapes
from largeformer.models.plain import PlainGPT
from tests.recipes import GPT2, LLAMA, tiny_recipe

pytest.importorskip("compressed_tensors")
VOCABULARY = 250


def sparse_model(folder: Path, shape: dict[str, Any]) -> tuple[StoredTensors, Any]:
    """Random weights under our names, every third of each linear layer's 0."""
    model = tiny_recipe(model={**shape, "num_layers": 2}).model
    torch.manual_seed(0)
    plain = PlainGPT(model, VOCABULARY)
    tensors = from_hugging_face(dict(plain.state_dict()), model, VOCABULARY, "llama")
    folder.mkdir()
    save_file(tensors, folder / "a.safetensors")
    for name in linear_weights(StoredTensors.of_folder(folder)):
        tensors[name] = tensors[name].flatten().index_fill(0, torch.arange(0, tensors[name].numel(), 3), 0.0).view_as(tensors[name])
    save_file(tensors, folder / "a.safetensors")
    return StoredTensors.of_folder(folder), model


SCHEMES = {
    "int8": Scheme(bits=8, activations="token"),
    "packed int8": Scheme(bits=8),
    "packed int4 with zero points": Scheme(bits=4, group_size=16, symmetric=False),
}


@pytest.mark.parametrize("shape", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
def test_floats_come_back_as_they_are(shape: dict[str, Any], tmp_path: Path) -> None:
    source, model = sparse_model(tmp_path / "ours", shape)
    (tmp_path / "hf").mkdir()
    write_weights(source, model, VOCABULARY, Plain(torch.float32), tmp_path / "hf", 10**9)
    write_configs(model, VOCABULARY, torch.float32, SpecialIds(eos=0), tmp_path / "hf")
    written = hugging_face_weights(tmp_path / "hf", model)
    assert all(torch.equal(written.read(name), source.read(name)) for name in linear_weights(source))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_integers_are_0_where_the_weights_are(scheme: Scheme, tmp_path: Path) -> None:
    source, model = sparse_model(tmp_path / "ours", LLAMA)
    made = Compressed(Quantization(scheme), torch.float32, shapes(rows(model, "llama"), model, VOCABULARY))
    (tmp_path / "hf").mkdir()
    write_weights(source, model, VOCABULARY, made, tmp_path / "hf", 10**9)
    write_configs(model, VOCABULARY, torch.float32, SpecialIds(eos=0), tmp_path / "hf", made.config())
    written = hugging_face_weights(tmp_path / "hf", model)
    assert not dict(zeros_lost(source, written))
    for name in linear_weights(source):
        weights, integers = source.read(name), written.read(name)
        assert integers.shape == weights.shape and ((integers.sign() == weights.sign()) | (integers == 0)).all()
        assert (integers != 0).sum() > 0.8 * (weights != 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2, tied")])
def test_onnx_files(shape: dict[str, Any], tmp_path: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    source, model = sparse_model(tmp_path / "ours", shape)
    (tmp_path / "onnx").mkdir()
    file = onnx.write_float(onnx.plain_twin(source, model, VOCABULARY), model, tmp_path / "onnx")
    integers = onnx.write_int8(file, ["model.layers.0.mlp.up_proj"], reduce_range=False)
    floats, rounded = onnx_weights(file, file, model), onnx_weights(integers, file, model)
    assert not dict(zeros_lost(source, rounded))
    for name in linear_weights(source):
        weights = source.read(name)
        torch.testing.assert_close(floats.read(name), weights, rtol=0, atol=0)
        assert ((rounded.read(name).sign() == weights.sign()) | (rounded.read(name) == 0)).all()
