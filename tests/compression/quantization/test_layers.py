"""A model as its integers compute: alike at every layout, and what the client of the exported folder computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.compression.linears import linears
from largeformer.compression.quantization.calibration import input_scales
from largeformer.compression.quantization.description import JSON, TENSORS, Description, check_scales, read_description
from largeformer.compression.quantization.layers import by_name, from_names, layer_errors, nearest_scales, quantized, with_input_scales
from largeformer.compression.quantization.names import Names
from largeformer.compression.quantization.schemes import Given, Scheme, rounded
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.models.gather import gather_full
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.recipes import GPT2, LLAMA, tiny_recipe

pytest.importorskip("compressed_tensors")
SCHEMES = {
    "W8A8": Scheme(8, activations="token"),
    "W8A8 static": Scheme(8, activations="tensor"),
    "W8A16": Scheme(8),
    "W4A16": Scheme(4, group_size=32, symmetric=False),
}
LAYOUTS = {"TP2": (2, 2), "DP2": (2, 1)}


def calibrated(ranks: RankContext, recipe: Recipe, scheme: Scheme, observer: str) -> dict[str, Any]:
    with model_on(ranks, recipe) as model, torch.no_grad():
        batches, names = model.batches(recipe, 8), Names(recipe.model)
        each = [linear for layer in linears(model.chunk, model.shards, model.groups) for linear in layer]
        scales = nearest_scales(each, scheme, torch.float32)
        if scheme.activations == "tensor":
            scales = with_input_scales(scales, input_scales(model.chunk, each, batches, model.groups, observer, 99.0))  # type: ignore[arg-type]
        by_linear = {linear.name: (linear, given) for linear, given in scales.items()}
        errors = layer_errors(
            model.chunk,
            model.shards,
            batches,
            model.groups,
            names,
            scheme,
            scales,
            lambda linear: rounded(linear.whole(), by_linear[linear.name][1], scheme),
        )
        # The same rows on every rank, whatever the layout.
        rows = [row for row in model_rows(recipe)]

        def logits() -> torch.Tensor:
            positions = torch.arange(recipe.model.seq_length)[None]
            return torch.cat([model.chunk(row, positions, None, runtime_gather_output=True) for row in rows])

        before = logits()
        with quantized(scheme, scales, model.groups):
            inside = logits()
        described = by_name(scales, names)
        again = from_names(described, each, names)
        assert all(torch.equal(again[linear].scale, given.scale) for linear, given in scales.items())
        return {
            "before": before,
            "inside": inside,
            "after": logits(),
            "given": described,
            "errors": {name: error.relative for name, error in errors.items()},
            "weights": gather_full(model.shards, lambda shard: shard.of(shard.parameter.detach())) if ranks.world_size == 1 else {},
        }


def model_rows(recipe: Recipe) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(recipe.tokenizer.vocab_size, (1, recipe.model.seq_length), generator=generator) for _ in range(2)]


@pytest.mark.parametrize(
    ("name", "observer"), [*((name, "minmax") for name in SCHEMES), ("W8A8 static", "percentile"), ("W8A8 static", "mse")]
)
def test_alike_at_every_layout(ranks: Any, name: str, observer: str) -> None:
    recipe, scheme = tiny_recipe(model=LLAMA), SCHEMES[name]
    one = ranks(1).run(calibrated, recipe, scheme, observer)[0]
    assert torch.equal(one["before"], one["after"]), "the block leaves nothing behind"
    error = ((one["inside"] - one["before"]).norm() / one["before"].norm()).item()
    assert 1e-3 < error < (0.2 if scheme.bits == 8 and observer != "percentile" else 0.8)
    assert len(one["given"]) == len(one["errors"]) == 7 * recipe.model.num_layers
    for layout, (world, tensor) in LAYOUTS.items():
        other = ranks(world).run(calibrated, at(recipe, tensor), scheme, observer)[0]
        for module, given in one["given"].items():
            assert torch.equal(other["given"][module].scale, given.scale), (layout, module)
            if given.input_scale is not None:
                torch.testing.assert_close(
                    other["given"][module].input_scale, given.input_scale, rtol=1e-3 if observer == "mse" else 1e-5, atol=0
                )
            assert other["errors"][module] == pytest.approx(one["errors"][module], rel=0.02), (layout, module)
        difference = ((other["inside"] - one["inside"]).norm() / one["inside"].norm()).item()
        assert difference < 0.2 * error, layout


def without_input(ranks: RankContext, recipe: Recipe, observer: str) -> dict[str, float]:
    """The scales where the first layer's attention hands nothing on."""
    with model_on(ranks, recipe) as model, torch.no_grad():
        each = [linear for layer in linears(model.chunk, model.shards, model.groups) for linear in layer]
        (qkv,) = [linear for linear in each if linear.name == "decoder.layers.0.self_attention.linear_qkv"]
        qkv.module.weight.zero_()  # type: ignore[operator, union-attr]
        found = input_scales(model.chunk, each, model.batches(recipe, 2), model.groups, observer, 99.0)  # type: ignore[arg-type]
        return {linear.name: scale.item() for linear, scale in found.items()}


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_inputs_that_are_all_zero_have_a_scale(ranks: Any, observer: str) -> None:
    (scales,) = ranks(1).run(without_input, tiny_recipe(model=LLAMA), observer)
    least = torch.finfo(torch.float32).eps
    assert scales.pop("decoder.layers.0.self_attention.linear_proj") == pytest.approx(least)
    assert all(least < scale < 1e3 for scale in scales.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_the_client_computes_what_evaluation_did(ranks: Any, name: str, tmp_path: Path) -> None:
    """The folder that is exported by these scales, opened by transformers: logits differ by the order of sums alone."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    from largeformer.export.clients import TransformersClient
    from largeformer.export.compressed_tensors import Compressed, Quantization
    from largeformer.export.huggingface import SpecialIds, write_configs, write_weights
    from largeformer.export.streaming import StoredTensors
    from largeformer.models.hf_mapping import rows, shapes

    recipe, scheme = tiny_recipe(model=LLAMA), SCHEMES[name]
    found = ranks(1).run(calibrated, recipe, scheme, "minmax")[0]
    theirs = shapes(rows(recipe.model, "llama"), recipe.model, recipe.tokenizer.vocab_size)
    encoder = Compressed(Quantization(scheme, given=found["given"]), torch.float32, theirs)
    save_file({name: tensor.contiguous() for name, tensor in found["weights"].items()}, tmp_path / "all.safetensors")
    folder = tmp_path / "out"
    folder.mkdir()
    write_weights(StoredTensors.of_folder(tmp_path), recipe.model, recipe.tokenizer.vocab_size, encoder, folder, 10**9)
    write_configs(recipe.model, recipe.tokenizer.vocab_size, torch.float32, SpecialIds(eos=2), folder, encoder.config())
    client = TransformersClient(folder)
    logits = torch.cat([client.logits(row) for row in model_rows(recipe)])
    ours = found["inside"][..., : recipe.tokenizer.vocab_size]
    unrounded = found["before"][..., : recipe.tokenizer.vocab_size]
    # A sum that comes out in another order may round an activation to the next integer.
    allowed = 0.2 if scheme.activations else 1e-3
    assert (logits - ours).norm() < allowed * (logits - unrounded).norm()


def test_errors_by_their_formula(ranks: Any) -> None:
    """Of the first layer's queries, with what goes into them: the normed embeddings."""
    recipe, scheme = tiny_recipe(model=LLAMA), SCHEMES["W8A8"]
    found = ranks(1).run(calibrated, recipe, scheme, "minmax")[0]
    weights = found["weights"]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(recipe.tokenizer.vocab_size, (8, recipe.model.seq_length + 1), generator=generator)[:, :-1]
    hidden = weights["embedding.word_embeddings.weight"][ids].flatten(0, 1)
    inputs = torch.nn.functional.rms_norm(hidden, (64,), weights["decoder.layers.0.input_layernorm.weight"], 1e-5)
    group = weights["decoder.layers.0.self_attention.linear_qkv.weight"].unflatten(0, (2, 4, 16))
    queries = group[:, :2].flatten(0, 2)
    given = found["given"]["model.layers.0.self_attn.q_proj"]
    scale = inputs.abs().amax(dim=1, keepdim=True) / 127.5
    exact = inputs @ queries.t()
    made = ((inputs / scale).round().clamp(-128, 127) * scale) @ rounded(queries, given, scheme).t()
    assert found["errors"]["model.layers.0.self_attn.q_proj"] == pytest.approx(((made - exact).norm() / exact.norm()).item(), rel=1e-4)


def test_gpt2_has_the_names_of_onnx(ranks: Any) -> None:
    found = ranks(1).run(calibrated, tiny_recipe(model=GPT2), SCHEMES["W8A8"], "minmax")[0]
    assert {name.rpartition(".")[2] for name in found["given"]} == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}


def described(checkpoint: str = "step_00000000") -> Description:
    given = {
        "model.layers.0.mlp.up_proj": Given(torch.rand(6, 2) + 0.1, torch.randint(-8, 7, (6, 2)).float()),
        "model.layers.0.mlp.gate_proj": Given(torch.rand(6, 1) + 0.1, input_scale=torch.tensor([0.25])),
    }
    return Description(SCHEMES["W4A16"], "gptq", ("model.layers.0.mlp.down_proj",), given, checkpoint)


def test_a_description_is_read_as_written_and_for_its_checkpoint_alone(tmp_path: Path) -> None:
    written = described()
    written.write(tmp_path)
    found = read_description(tmp_path / "checkpoints" / "step_00000000")
    assert found is not None
    assert (found.scheme, found.method, found.ignore) == (written.scheme, "gptq", written.ignore)
    for module, given in written.given.items():
        for part in ("scale", "zero_point", "input_scale"):
            ours, theirs = getattr(given, part), getattr(found.given[module], part)
            assert ours is theirs is None or torch.equal(ours, theirs)
    assert read_description(tmp_path / "checkpoints" / "step_00000002") is None
    assert read_description(tmp_path / "elsewhere" / "checkpoints" / "step_00000000") is None


@pytest.mark.parametrize("damage", ["tensors gone", "other tensors", "no JSON"])
def test_a_damaged_description_is_bad_input(tmp_path: Path, damage: str) -> None:
    described().write(tmp_path)
    if damage == "tensors gone":
        (tmp_path / TENSORS).unlink()
    elif damage == "other tensors":
        content = bytearray((tmp_path / TENSORS).read_bytes())
        content[-1] ^= 1
        (tmp_path / TENSORS).write_bytes(bytes(content))
    else:
        (tmp_path / JSON).write_text("{")
    with pytest.raises(BadInputError, match="does not say how its weights were quantized"):
        read_description(tmp_path / "checkpoints" / "step_00000000")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_none_is_bad_input(value: float) -> None:
    with pytest.raises(BadInputError, match=r"up_proj.weight_scale holds .*: a scale must be finite and above 0"):
        check_scales({"model.layers.0.mlp.up_proj": Given(torch.tensor([[1.0], [value]]))})
