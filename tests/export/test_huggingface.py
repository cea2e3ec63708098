"""Folders that transformers opens: the same logits as the source, at any layout that the checkpoint was saved in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from largeformer.checkpoint.format import write_blocks
from largeformer.compression.quantization.schemes import Given, Scheme, library_scheme
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.export.clients import TransformersClient
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.huggingface import Encoder, Plain, SpecialIds, write_configs, write_weights
from largeformer.export.streaming import StoredTensors
from largeformer.models.gpt import build_gpt
from largeformer.models.hf_mapping import rows, shapes, to_hugging_face
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import create_groups, destroy_groups
from largeformer.training.state import weight_blocks
from tests.distributed import RankContext, RankPool
from tests.models.test_hf_parity import SHAPES, perturb
from tests.one_process import Built, random_batch
from tests.recipes import LLAMA, tiny_recipe

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
VOCABULARY = 250
IDS = SpecialIds(eos=2, pad=3)
SCHEMES = {
    "W8A8, a scale for each token": Scheme(bits=8, activations="token"),
    "W8A16": Scheme(bits=8),
    "W8A16, asymmetric": Scheme(bits=8, symmetric=False),
    "W4A16": Scheme(bits=4, group_size=32),
    "W4A16, asymmetric": Scheme(bits=4, group_size=32, symmetric=False),
}


def stored(built: Built, folder: Path) -> StoredTensors:
    folder.mkdir()
    save_file(built.weights(), folder / "all.safetensors")
    return StoredTensors.of_folder(folder)


def export(source: StoredTensors, recipe: Recipe, folder: Path, encoder: Encoder, quantization: Any = None, shard: int = 10**9) -> Path:
    folder.mkdir()
    write_weights(source, recipe.model, VOCABULARY, encoder, folder, shard)
    write_configs(recipe.model, VOCABULARY, torch.float32, IDS, folder, quantization)
    return folder


def compressed(recipe: Recipe, scheme: Scheme, **more: Any) -> Compressed:
    return Compressed(Quantization(scheme, **more), torch.float32, shapes(rows(recipe.model, "llama"), recipe.model, VOCABULARY))


@pytest.mark.parametrize("name", SHAPES)
def test_logits(name: str, one_process: Callable[[Recipe], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largeformer.export.huggingface.PART_BYTES", 4096)  # many parts of each tensor
    recipe = tiny_recipe(model=SHAPES[name])
    built = one_process(recipe)
    perturb(built)
    folder = export(stored(built, tmp_path / "weights"), recipe, tmp_path / "hf", Plain(torch.float32), shard=60_000)
    assert (folder / "model.safetensors.index.json").exists()
    client = TransformersClient(folder)
    tokens = random_batch(VOCABULARY, 2, recipe.model.seq_length).tokens
    with torch.no_grad():
        ours = built.model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)[..., :VOCABULARY]
    torch.testing.assert_close(client.logits(tokens), ours, rtol=0, atol=1e-4)
    assert ours.std() > 0.1
    assert client.model.config.eos_token_id == 2 and client.model.config.bos_token_id is None
    assert len(client.generate([5, 6, 7], 4)) == 4


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", SCHEMES)
def test_integers_are_the_librarys_own(
    name: str, tied: bool, one_process: Callable[[Recipe], Built], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written a few rows at a time they are what the library makes of whole matrices, and its client sees weights near ours."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    monkeypatch.setattr("largeformer.export.huggingface.PART_BYTES", 6000)
    recipe, scheme = tiny_recipe(model={**LLAMA, "tie_embeddings": tied}), SCHEMES[name]
    built = one_process(recipe)
    perturb(built)
    encoder = compressed(recipe, scheme)
    folder = export(stored(built, tmp_path / "weights"), recipe, tmp_path / "int", encoder, encoder.config())
    found, floats, library = load_file(folder / "model.safetensors"), to_hugging_face(built.weights(), recipe.model), library_scheme(scheme)
    assert len(encoder.modules) == 7 * recipe.model.num_layers and encoder.ignored == ([] if tied else ["lm_head"])
    assert encoder.config()["ignore"] == ["lm_head"], "a tied head too: clients would look for its integers"
    for module in encoder.modules:
        weight = floats.pop(f"{module}.weight").contiguous()
        grouped = weight.unflatten(1, (-1, scheme.group_size or weight.shape[1]))
        scale, zero = calculate_qparams(*grouped.aminmax(dim=2), library.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        expected = BaseCompressor.get_value_from_registry(scheme.format).compress(state, library)
        mine = {key.removeprefix(f"{module}."): tensor for key, tensor in found.items() if key.startswith(f"{module}.")}
        assert mine.keys() == expected.keys(), module
        assert all(torch.equal(mine[key], expected[key]) for key in mine), module
    assert all(torch.equal(found[key], tensor) for key, tensor in floats.items()), "what is not linear stays as it is"
    model = TransformersClient(folder)
    tokens = random_batch(VOCABULARY, 2, 16).tokens
    with torch.no_grad():
        ours = built.model(tokens, torch.arange(16).expand_as(tokens), None)[..., :VOCABULARY]
    error = (model.logits(tokens) - ours).norm() / ours.norm()
    assert error < (0.03 if scheme.bits == 8 else 0.3)
    assert error > 0


def test_round_to_nearest_by_its_formula(one_process: Callable[[Recipe], Built], tmp_path: Path) -> None:
    recipe = tiny_recipe(model=LLAMA)
    built = one_process(recipe)
    encoder = compressed(recipe, Scheme(bits=8, activations="token"))
    folder = export(stored(built, tmp_path / "weights"), recipe, tmp_path / "int", encoder, encoder.config())
    found = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    weight = to_hugging_face(built.weights(), recipe.model)[name]
    scale = weight.abs().amax(dim=1, keepdim=True) / 127.5
    assert torch.equal(found[f"{name}_scale"], scale)
    assert torch.equal(found[name], (weight / scale).round().clamp(-128, 127).to(torch.int8))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["format"], config["quantization_status"], config["ignore"]) == ("int-quantized", "compressed", ["lm_head"])
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True


def test_scales_that_calibration_found_are_used(one_process: Callable[[Recipe], Built], tmp_path: Path) -> None:
    recipe = tiny_recipe(model=LLAMA)
    built = one_process(recipe)
    modules = compressed(recipe, Scheme(bits=8, activations="token")).modules
    floats = to_hugging_face(built.weights(), recipe.model)
    given = {
        module: Given(torch.full((len(floats[f"{module}.weight"]), 1), 0.001), input_scale=torch.tensor([0.5 + number]))
        for number, module in enumerate(modules)
    }
    encoder = compressed(recipe, Scheme(bits=8, activations="tensor"), given=given)
    folder = export(stored(built, tmp_path / "weights"), recipe, tmp_path / "int", encoder, encoder.config())
    found = load_file(folder / "model.safetensors")
    for number, module in enumerate(modules):
        assert found[f"{module}.input_scale"].tolist() == [0.5 + number]
        assert torch.equal(found[f"{module}.weight"], (floats[f"{module}.weight"] / 0.001).round().clamp(-128, 127).to(torch.int8))
    TransformersClient(folder).logits(torch.tensor([[1, 2, 3]]))


def save_at_layout(ranks: RankContext, recipe: Recipe, folder: Path) -> None:
    device = prepare_device(0)
    groups = create_groups(recipe.layout(ranks.world_size))
    seed_ranks(1, groups.coordinates.tensor, groups.coordinates.data, groups.coordinates.pipeline)
    _, shards = build_gpt(recipe, groups, device)
    folder.mkdir(exist_ok=True)
    write_blocks(folder / f"rank_{ranks.rank}.safetensors", weight_blocks([shard for shard in shards if shard.main]))
    destroy_groups()


LAYOUTS = {"TP1": (1, {}), "TP2": (2, {"tensor_model_parallel_size": 2}), "PP2": (2, {"pipeline_model_parallel_size": 2})}


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gpt2"])
def test_any_layout_exports_the_same_bytes(ranks: Callable[[int], RankPool], tmp_path: Path, name: str) -> None:
    made: dict[str, dict[str, bytes]] = {}
    for layout, (world_size, parallel) in LAYOUTS.items():
        recipe = tiny_recipe(model=SHAPES[name], parallel=parallel)
        weights = tmp_path / layout
        ranks(world_size).run(save_at_layout, recipe, weights)
        source = StoredTensors.of_folder(weights)
        encoders: dict[str, Encoder] = {"hf": Plain(torch.float32)}
        if name != "gpt2":
            encoders |= {scheme: compressed(recipe, SCHEMES[scheme]) for scheme in ("W8A8, a scale for each token", "W4A16")}
        folders = {kind: export(source, recipe, tmp_path / f"{layout} {kind}", encoder) for kind, encoder in encoders.items()}
        made[layout] = {kind: (folder / "model.safetensors").read_bytes() for kind, folder in folders.items()}
    assert made["TP1"] == made["TP2"]
    assert made["TP1"] == made["PP2"]


BAD: dict[str, tuple[Scheme, dict[str, Any], str]] = {
    "group size": (
        Scheme(bits=4, group_size=48),
        {},
        "export.group_size 48 does not divide 64, the inputs of 24 layers such as model.layers.0",
    ),
    "asymmetric with activations": (Scheme(bits=8, symmetric=False, activations="token"), {}, "set export.symmetric to true"),
    "no such layer": (Scheme(bits=8), {"ignore": ("model.layers.9.mlp.up_proj",)}, "export.keep_float names model.layers.9.mlp.up_proj"),
    "static without scales": (Scheme(bits=8, activations="tensor"), {}, "static activations need an input scale of every layer"),
}


@pytest.mark.parametrize(("scheme", "more", "sentence"), BAD.values(), ids=BAD)
def test_a_scheme_that_does_not_fit_is_bad_input(scheme: Scheme, more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInputError, match=sentence):
        compressed(tiny_recipe(model=LLAMA), scheme, **more)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_none_is_bad_input(one_process: Callable[[Recipe], Built], tmp_path: Path, value: float) -> None:
    recipe = tiny_recipe(model=LLAMA)
    module = "model.layers.0.self_attn.q_proj"
    encoder = compressed(recipe, Scheme(bits=8), given={module: Given(torch.full((64, 1), value))})
    with pytest.raises(BadInputError, match=r"q_proj.weight_scale holds .*: a scale must be finite and above 0"):
        export(stored(one_process(recipe), tmp_path / "weights"), recipe, tmp_path / "int", encoder)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)], ids=["NaN", "beyond fp16"])
def test_a_weight_that_is_not_finite_is_bad_input(
    one_process: Callable[[Recipe], Built], tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    recipe = tiny_recipe(model=LLAMA)
    built = one_process(recipe)
    with torch.no_grad():
        built.model.decoder.layers[1].mlp.linear_fc2.weight[3, 4] = value
    with pytest.raises(BadInputError, match=r"model.layers.1.mlp.down_proj.weight is not finite in float"):
        export(stored(built, tmp_path / "weights"), recipe, tmp_path / "hf", Plain(dtype))
