"""Which formats an export writes, and what is told beforehand of those that it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from largeformer.compression.quantization.description import Description
from largeformer.compression.quantization.schemes import Scheme
from largeformer.errors import BadInputError
from largeformer.export import gate
from largeformer.export.formats import Job, chosen
from largeformer.export.huggingface import SpecialIds
from largeformer.export.streaming import StoredTensors
from tests.recipes import GPT2, LLAMA, tiny_recipe

for library in ("transformers", "compressed_tensors", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library)
STATIC = Description(Scheme(bits=8, activations="tensor"), "rtn", (), {}, "step_00000000")


def job(folder: Path, model: dict[str, Any], export: dict[str, Any], stored: torch.dtype = torch.float32, **more: Any) -> Job:
    """Of a model whose weights are `stored` so; none of them is read."""
    save_file({"embedding.word_embeddings.weight": torch.zeros(2, 2, dtype=stored)}, folder / "a.safetensors")
    recipe = tiny_recipe(model=model, export={"group_size": 32, **export})
    return Job(StoredTensors.of_folder(folder), recipe.model, recipe.tokenizer, recipe.export, SpecialIds(2, 3), **more)


HELD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama": (LLAMA, ["hf", "hf-int8", "onnx"]),
    "gpt2": (GPT2, ["hf", "onnx"]),
    "neither": ({**LLAMA, "normalization": "LayerNorm"}, ["onnx"]),
}


@pytest.mark.parametrize(("model", "formats"), HELD.values(), ids=HELD)
def test_by_default_what_can_hold_the_shape(tmp_path: Path, model: dict[str, Any], formats: list[str]) -> None:
    assert chosen(job(tmp_path, model, {})) == formats


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no such layer": ({"keep_float": ["head"]}, {}, "hf-int8: export.keep_float names head"),
    "asymmetric": ({"symmetric": False}, {}, "hf-int8: integer activations go with symmetric weights"),
    "static without a scale": ({"keep_float": []}, {"quantized": STATIC}, "hf-int8-static: static activations need an input scale"),
    "no such layer of ONNX": ({"onnx_keep_float": ["model.layers.9.mlp.up_proj"]}, {}, "onnx: export.onnx_keep_float names model.layers.9"),
}


@pytest.mark.parametrize(("export", "more", "sentence"), BAD.values(), ids=BAD)
def test_a_default_format_is_not_left_out_for_a_mistake(
    tmp_path: Path, export: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(BadInputError, match=sentence):
        chosen(job(tmp_path, LLAMA, export, **more))


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_layers_of_onnx_are_named_as_a_llamas(tmp_path: Path, model: dict[str, Any]) -> None:
    keep = ["lm_head", "model.layers.3.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert chosen(job(tmp_path, model, {"formats": ["onnx"], "onnx_keep_float": keep})) == ["onnx"]


@pytest.mark.parametrize(
    ("stored", "dtype", "limits"),
    [
        (torch.float32, "fp32", gate.EXACT),
        (torch.bfloat16, "fp32", gate.EXACT),
        (torch.float16, "auto", gate.EXACT),
        (torch.float32, "bf16", gate.NARROWER),
        (torch.float16, "bf16", gate.NARROWER),
        (torch.bfloat16, "fp16", gate.NARROWER),
    ],
)
def test_floats_are_exact_where_the_dtype_has_every_number(tmp_path: Path, stored: torch.dtype, dtype: str, limits: object) -> None:
    assert job(tmp_path, LLAMA, {"dtype": dtype}, stored).exactness is limits
