"""GPTQ against the algorithm written out plainly, and what it must keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from largeformer.compression.linears import linears
from largeformer.compression.quantization.gptq import gptq
from largeformer.compression.quantization.layers import gptq_layers
from largeformer.compression.quantization.schemes import Given, Scheme, library_scheme, rounded, weight_scales
from largeformer.config.quantize import GPTQConfig
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.models.gather import gather_full
from largeformer.models.hf_config import hugging_face_config
from largeformer.models.hf_mapping import to_hugging_face
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.recipes import LLAMA, tiny_recipe

pytest.importorskip("compressed_tensors")
SCHEMES = {
    "W4 in groups": Scheme(4, group_size=32),
    "W4 in groups, asymmetric": Scheme(4, group_size=32, symmetric=False),
    "W8": Scheme(8),
}


def problem(seed: int = 0, rows: int = 40, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs whose channels hang together, as text's do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * 0.1, torch.randn(600, columns, generator=generator) @ mix


def plainly(weights: torch.Tensor, hessian: torch.Tensor, given: Given, scheme: Scheme, order: list[int]) -> torch.Tensor:
    """Equations (2) and (3) of the paper, in float64: after each column the inverse Hessian of those that are left is made anew."""
    left, weights = list(order), weights.double().clone()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    while left:
        column, inverse = left[0], torch.linalg.inv(damped[left][:, left])
        group = column // (weights.shape[1] // given.scale.shape[1])
        zero = given.zero_point[:, group : group + 1] if given.zero_point is not None else None
        made = rounded(weights[:, [column]].float(), Given(given.scale[:, group : group + 1], zero), scheme).double()
        error = (weights[:, [column]] - made) / inverse[0, 0]
        weights[:, left] -= error * inverse[0]
        weights[:, [column]] = made
        left = left[1:]
    return weights


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_papers_algorithm(scheme: Scheme, act_order: bool) -> None:
    weights, inputs = problem()
    hessian = 2 * inputs.t() @ inputs / len(inputs)
    given = weight_scales(weights, scheme, torch.float32)
    found = gptq(weights, hessian, given, scheme, GPTQConfig(block_size=24, act_order=act_order))
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(weights.shape[1]))
    expected = plainly(weights, hessian, given, scheme, order)
    scale = given.scale.repeat_interleave(weights.shape[1] // given.scale.shape[1], dim=1)
    steps = ((found - expected) / scale).abs()
    assert (steps < 1e-3).double().mean() >= 0.999, "float32 may round a tie the other way, and no more"
    torch.testing.assert_close(rounded(found, given, scheme), found, rtol=1e-6, atol=1e-7)
    nearest = rounded(weights, given, scheme)
    errors = {name: ((made - weights) @ inputs.t()).norm() for name, made in {"gptq": found, "nearest": nearest}.items()}
    assert errors["gptq"] < 0.9 * errors["nearest"]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_zeros_stay_and_dead_channels_become_zero(scheme: Scheme) -> None:
    weights, inputs = problem(1)
    pruned = torch.rand(weights.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    weights[pruned] = 0
    inputs[:, 11] = 0
    given = weight_scales(weights, scheme, torch.float32)
    found = gptq(weights, inputs.t() @ inputs, given, scheme, GPTQConfig(block_size=24))
    assert (found[pruned] == 0).all() and (found[:, 11] == 0).all()
    assert ((found - weights) @ inputs.t()).norm() < ((rounded(weights, given, scheme) - weights) @ inputs.t()).norm()


def test_singular_equations_are_bad_input() -> None:
    weights, inputs = problem(2)
    given = weight_scales(weights, SCHEMES["W8"], torch.float32)
    hessian = inputs[:3].t() @ inputs[:3]
    assert torch.isfinite(gptq(weights, hessian, given, SCHEMES["W8"], GPTQConfig())).all()
    with pytest.raises(BadInputError, match=r"gptq.dampening 1e-30 leaves GPTQ's equations unsolvable"):
        gptq(weights, hessian, given, SCHEMES["W8"], GPTQConfig(dampening=1e-30))


def walked(ranks: RankContext, recipe: Recipe, scheme: Scheme) -> dict[str, Any]:
    with model_on(ranks, recipe) as model:
        batches, settings = model.batches(recipe, 8), GPTQConfig()
        first = linears(model.chunk, model.shards, model.groups)[0]
        names = {linear.name for layer in linears(model.chunk, model.shards, model.groups) for linear in layer} - {first[2].name}
        kept = first[2].whole()
        scales = gptq_layers(
            model.chunk, model.shards, batches, model.groups, scheme, settings, lambda w: weight_scales(w, scheme, torch.float32), names
        )
        assert torch.equal(first[2].whole(), kept), "a layer that was not named is left alone"
        whole = {linear.name: linear.whole() for layer in linears(model.chunk, model.shards, model.groups) for linear in layer}
        return {"weights": whole, "scales": scales}


def solved(ranks: RankContext, recipe: Recipe, scheme: Scheme, act_order: bool) -> dict[str, Any]:
    """All linear layers of a model by GPTQ: our tensors before and after, and the ids of the calibration text."""
    with model_on(ranks, recipe) as model:
        batches, layers = model.batches(recipe, 16), linears(model.chunk, model.shards, model.groups)

        def weights() -> dict[str, torch.Tensor]:
            return gather_full(model.shards, lambda shard: shard.of(shard.parameter.detach()).clone())

        before, names = weights(), [linear.name for layer in layers for linear in layer]
        settings = GPTQConfig(act_order=act_order)
        gptq_layers(
            model.chunk, model.shards, batches, model.groups, scheme, settings, lambda w: weight_scales(w, scheme, torch.float32), names
        )
        return {"before": before, "after": weights(), "tokens": torch.cat([batch.tokens for batch in batches])}


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "largest first"])
@pytest.mark.parametrize("scheme", [SCHEMES["W4 in groups"], SCHEMES["W8"]], ids=["W4", "W8"])
def test_as_llm_compressor_on_the_exported_twin(ranks: Any, scheme: Scheme, act_order: bool, tmp_path: Path) -> None:
    recipe = tiny_recipe(model={**LLAMA, "num_layers": 2})
    found = ranks(1).run(solved, recipe, scheme, act_order)[0]
    theirs = by_llm_compressor(found["before"], found["tokens"], recipe, scheme, act_order, tmp_path)
    ours, before = (to_hugging_face(found[key], recipe.model) for key in ("after", "before"))
    equal = total = 0
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            scale = weight_scales(weight, scheme, torch.float32).scale
            steps = ((ours[name] - theirs[name]) / scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)).abs()
            assert ((ours[name] - weight) / scale.mean()).abs().max() > 0.5, "more than rounding was done"
            equal, total = equal + int((steps < 1e-2).sum()), total + steps.numel()
    assert equal >= 0.999 * total > 0, equal / total


def by_llm_compressor(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, recipe: Recipe, scheme: Scheme, act_order: bool, folder: Path
) -> dict[str, torch.Tensor]:
    compressor = pytest.importorskip("llmcompressor")
    modifiers = pytest.importorskip("llmcompressor.modifiers.gptq")
    datasets, transformers, tokenizers = (pytest.importorskip(name) for name in ("datasets", "transformers", "tokenizers"))
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hugging_face_config(recipe.model, recipe.tokenizer.vocab_size)))
    twin.load_state_dict(to_hugging_face(weights, recipe.model))
    twin.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    library = library_scheme(scheme)
    library.weights.observer, library.format = "minmax", None
    settings: dict[str, Any] = {
        "ignore": ["lm_head"],
        "block_size": 128,
        "dampening_frac": 0.01,
        "actorder": "weight" if act_order else None,
    }
    settings["config_groups"] = {"group_0": library}
    rows = tokens.tolist()
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    compressor.oneshot(
        model=model,
        dataset=datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}),
        recipe=[modifiers.GPTQModifier(**settings)],
        num_calibration_samples=len(rows),
        max_seq_length=tokens.shape[1],
        shuffle_calibration_samples=False,
        pipeline="sequential",
        processor=transformers.PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="a"),
    )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("scheme", [SCHEMES["W4 in groups"], SCHEMES["W8"]], ids=["W4", "W8"])
def test_integers_at_any_layout(ranks: Any, scheme: Scheme) -> None:
    recipe = tiny_recipe(model=LLAMA)
    one = ranks(1).run(walked, recipe, scheme)[0]
    assert len(one["scales"]) == 4 * recipe.model.num_layers - 1
    for name, (world, tensor) in {"TP2": (2, 2), "DP2": (2, 1)}.items():
        other = ranks(world).run(walked, at(recipe, tensor), scheme)[0]
        equal = total = 0
        for linear, given in one["scales"].items():
            torch.testing.assert_close(other["scales"][linear].scale, given.scale, rtol=2e-7, atol=0)
            scale = given.scale.repeat_interleave(one["weights"][linear].shape[1] // given.scale.shape[1], dim=1)
            steps = ((other["weights"][linear] - one["weights"][linear]) / scale).round().abs()
            equal, total = equal + int((steps == 0).sum()), total + steps.numel()
            assert steps.max() <= 1, (name, linear)
        assert equal / total >= 0.999, (name, equal / total)
