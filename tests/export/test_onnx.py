"""ONNX in onnxruntime: the twin's logits, the cache, batches and padding, integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from largeformer.compression.quantization.schemes import Given, Scheme
from largeformer.errors import BadInputError
from largeformer.export import onnx
from largeformer.export.clients import OnnxClient
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.streaming import StoredTensors
from largeformer.export.twin import CachedGPT
from largeformer.models.hf_mapping import from_hugging_face, rows, shapes
from largeformer.models.plain import PlainGPT
from tests.recipes import GPT2, LLAMA, tiny_recipe

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library)

SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied, wide heads": {**LLAMA, "tie_embeddings": True, "kv_channels": 24},
    "gpt2, tied": GPT2,
    "learned positions, RMSNorm, exact GELU": {"position_embedding": "learned", "activation": "gelu"},
    "no positions": {"position_embedding": "none"},
}


def plain_model(name: str, **more: Any) -> tuple[PlainGPT, Any]:
    torch.manual_seed(0)
    model = tiny_recipe(model={**SHAPES[name], "num_layers": 2, **more}).model
    plain = PlainGPT(model, 250).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return plain, model


def tokens_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SHAPES), ("llama", torch.bfloat16)])
@torch.no_grad()
def test_the_twin_with_a_cache_is_the_twin_without(name: str, dtype: torch.dtype) -> None:
    plain, model = plain_model(name)
    plain.to(dtype)
    twin, tokens = CachedGPT(plain, model).eval(), tokens_of(3, 12)
    cache = [(torch.zeros(3, model.query_groups, 0, model.head_dim, dtype=dtype),) * 2 for _ in range(model.num_layers)]
    logits = []
    for first, last in ((0, 5), (5, 6), (6, 12)):
        positions = torch.arange(first, last).expand(3, -1)
        made, cache = twin(tokens[:, first:last], torch.ones(3, last, dtype=torch.int64), positions, cache)
        logits.append(made)
    torch.testing.assert_close(torch.cat(logits, 1), plain(tokens), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainGPT, Any, Path]:
    plain, model = plain_model("llama", hidden_size=256, ffn_hidden_size=512)
    return plain, model, onnx.write_float(plain, model, tmp_path_factory.mktemp("onnx"))


@torch.no_grad()
def test_logits_cache_and_batches(llama: tuple[PlainGPT, Any, Path]) -> None:
    plain, _, file = llama
    client = OnnxClient(file, threads=1)
    for count, length in ((1, 1), (1, 32), (4, 7)):
        tokens = tokens_of(count, length)
        logits, _ = client.advance(tokens.numpy())
        np.testing.assert_allclose(logits, plain(tokens).numpy(), rtol=0, atol=1e-4)
    tokens = tokens_of(2, 20)
    torch.testing.assert_close(client.logits(tokens), plain(tokens), rtol=0, atol=1e-4)
    made, expected = client.generate([1, 2, 3], 6), [1, 2, 3]
    for _ in range(6):
        expected.append(int(plain(torch.tensor([expected]))[0, -1].argmax()))
    assert made == expected[3:]


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(llama: tuple[PlainGPT, Any, Path]) -> None:
    plain, _, file = llama
    client, tokens = OnnxClient(file, threads=1), tokens_of(1, 6)
    padded = np.concatenate([np.zeros((1, 3), dtype=np.int64), tokens.numpy()], axis=1)
    feed = {
        "input_ids": padded,
        "attention_mask": np.array([[0] * 3 + [1] * 6]),
        "position_ids": np.array([[0, 0, 0, *range(6)]]),
        **client._empty,
    }
    logits = client.session.run(["logits"], feed)[0]
    np.testing.assert_allclose(logits[:, 3:], plain(tokens).numpy(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_integers(llama: tuple[PlainGPT, Any, Path]) -> None:
    plain, _, file = llama
    integers = onnx.write_int8(file, (), reduce_range=not onnx.has_vnni())
    assert onnx.count_products(file) == {"integer": 0, "float": 15}
    assert onnx.count_products(integers) == {"integer": 15, "float": 0}  # 7 in each of two layers, and the head
    assert onnx.bad_scales(integers) == []
    assert integers.stat().st_size <= 0.3 * file.stat().st_size
    tokens = tokens_of(2, 20)
    logits, expected = OnnxClient(integers, threads=1).logits(tokens), plain(tokens)
    assert 0 < (logits - expected).norm() / expected.norm() < 0.1  # seven bits, where the CPU has no VNNI


def test_a_layer_that_stays_float_is_seen(llama: tuple[PlainGPT, Any, Path], tmp_path: Path) -> None:
    file = tmp_path / onnx.FLOAT
    file.write_bytes(llama[2].read_bytes())
    integers = onnx.write_int8(file, ("lm_head", "model.layers.1.mlp.down_proj"), reduce_range=True)
    assert onnx.count_products(integers) == {"integer": 13, "float": 2}
    with pytest.raises(BadInputError, match=r"onnx_keep_float names model\.layers\.7\.mlp\.up_proj; layers are named as model\.layers\.0"):
        onnx.write_int8(file, ("model.layers.7.mlp.up_proj",), reduce_range=True)


def test_integers_that_a_stage_has_found_are_those_of_hugging_faces_folder(llama: tuple[PlainGPT, Any, Path], tmp_path: Path) -> None:
    """Of all but one layer: that one's follow from its extremes, as the quantizer takes them."""
    pytest.importorskip("compressed_tensors")
    from onnx import load, numpy_helper

    plain, model, float_file = llama
    file = tmp_path / onnx.FLOAT
    file.write_bytes(float_file.read_bytes())
    floats, other = plain.state_dict(), "model.layers.1.mlp.down_proj"
    theirs = shapes(rows(model, "llama"), model, 250)
    modules = [name.removesuffix(".weight") for name in theirs if name.endswith("_proj.weight") and name != f"{other}.weight"]
    given = {module: Given(0.9 * floats[f"{module}.weight"].abs().amax(1, keepdim=True) / 127.5) for module in modules}
    encoder = Compressed(Quantization(Scheme(bits=8, activations="token"), given=given), torch.float32, theirs)
    made = onnx.write_int8(file, ("model.layers.0.mlp.up_proj",), False, {name: one.scale for name, one in given.items()})
    held = {initializer.name: numpy_helper.to_array(initializer) for initializer in load(str(made)).graph.initializer}
    for module, matrix in onnx.linear_matrices(file).items():
        if module == "model.layers.0.mlp.up_proj":
            assert f"{matrix}_quantized" not in held
            continue
        weight = floats[f"{module}.weight"]
        if module in given:
            expected = encoder.encode(f"{module}.weight", weight, 0)
            assert np.array_equal(held[f"{matrix}_quantized"].T, expected[f"{module}.weight"].numpy()), module
            assert np.array_equal(held[f"{matrix}_scale"], expected[f"{module}.weight_scale"][:, 0].numpy()), module
        else:
            np.testing.assert_allclose(held[f"{matrix}_scale"], weight.abs().amax(1).numpy() / 127, rtol=1e-6)
    OnnxClient(made, threads=1).logits(tokens_of(1, 5))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "llama"])
@torch.no_grad()
def test_every_shape(name: str, tmp_path: Path) -> None:
    plain, model = plain_model(name, hidden_size=256, ffn_hidden_size=512)
    file = onnx.write_float(plain, model, tmp_path)
    integers = onnx.write_int8(file, (), reduce_range=not onnx.has_vnni())
    tokens = tokens_of(2, 20)
    torch.testing.assert_close(OnnxClient(file, threads=1).logits(tokens), plain(tokens), rtol=0, atol=1e-4)
    assert onnx.count_products(integers)["float"] == 0
    assert integers.stat().st_size <= 0.3 * file.stat().st_size
    assert (OnnxClient(integers, threads=1).logits(tokens) - plain(tokens)).norm() / plain(tokens).norm() < 0.1


@torch.no_grad()
def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs hold two gigabytes at most: weights beyond that stand in files of their own, which move with the folder."""
    monkeypatch.setattr(onnx, "_LARGEST_INLINE", 0)
    plain, model = plain_model("llama", hidden_size=256, ffn_hidden_size=512)
    (tmp_path / "made").mkdir()
    integers = onnx.write_int8(onnx.write_float(plain, model, tmp_path / "made"), (), reduce_range=not onnx.has_vnni())
    assert onnx.count_products(integers)["float"] == 0 and onnx.bad_scales(integers) == []
    folder = (tmp_path / "made").rename(tmp_path / "moved")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sorted(sizes) == ["model.onnx", "model.onnx.data", "model_int8.onnx", "model_int8.onnx.data"]
    assert sizes["model.onnx"] < 0.1 * sizes["model.onnx.data"] and sizes["model_int8.onnx.data"] <= 0.3 * sizes["model.onnx.data"]
    tokens = tokens_of(2, 20)
    torch.testing.assert_close(OnnxClient(folder / "model.onnx", threads=1).logits(tokens), plain(tokens), rtol=0, atol=1e-4)
    answers = OnnxClient(folder / "model_int8.onnx", threads=1).logits(tokens)
    assert (answers - plain(tokens)).norm() / plain(tokens).norm() < 0.1


def test_the_twin_takes_the_checkpoints_weights(tmp_path: Path) -> None:
    plain, model = plain_model("llama")
    save_file(from_hugging_face(plain.state_dict(), model, 250, "llama"), tmp_path / "a.safetensors")
    loaded = onnx.plain_twin(StoredTensors.of_folder(tmp_path), model, 250)
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    with pytest.raises(BadInputError, match="which is not this model's"):
        onnx.plain_twin(StoredTensors.of_folder(tmp_path), model, 251)
