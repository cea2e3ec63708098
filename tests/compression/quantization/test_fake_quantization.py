"""Training with rounding: the loss is that of the rounded model, gradients pass straight through, alike at every layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from largeformer.compression.linears import linears
from largeformer.compression.quantization.fake_quantization import round_in, train_rounded
from largeformer.compression.quantization.schemes import Scheme, rounded, rounded_inputs, weight_scales
from largeformer.config.schema import Recipe
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.models.plain import PlainGPT
from tests.compression.models import at, model_on
from tests.distributed import RankContext
from tests.recipes import GPT2, LLAMA, tiny_recipe
from tests.training import engines
from tests.training.engines import PP2, TP2, TP2_SP, assert_same, bench_of, global_batch, sgd_recipe

pytest.importorskip("compressed_tensors")
SCHEMES = {
    "W8A8": Scheme(8, activations="token"),
    "W8A8 static": Scheme(8, activations="tensor"),
    "W8A16": Scheme(8, symmetric=False),
    "W4A16": Scheme(4, group_size=16),
}
KEPT = frozenset({"decoder.layers.0.mlp.linear_fc1"})
STATIC = 0.02  # cuts off what is beyond 2.55


def input_scales(recipe: Recipe) -> dict[str, torch.Tensor]:
    kinds = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    return {f"decoder.layers.{layer}.{kind}": torch.tensor([STATIC]) for layer in range(recipe.model.num_layers) for kind in kinds}


def stepped(ranks: RankContext, recipe: Recipe, scheme: Scheme) -> dict[str, Any]:
    """Loss, gradients and weights of one step with rounding; the loss of evaluation after it."""
    build = engines.build_engine

    def altered(recipe: Recipe, chunks: Any, shards: Any, groups: Any, deepspeed: Any) -> Any:
        train_rounded(chunks, shards, groups, scheme, input_scales(recipe), KEPT)
        return build(recipe, chunks, shards, groups, deepspeed)

    with mock.patch.object(engines, "build_engine", altered), bench_of(ranks, recipe) as bench:
        batch = global_batch(recipe)
        start = bench.weights()
        result = bench.engine.train_step(bench.share(batch), lr=0.1)
        return {"start": start, "loss": result.loss, "weights": bench.weights(), "after": bench.engine.evaluate(bench.share(batch))[0]}


def plainly(recipe: Recipe, start: dict[str, torch.Tensor], scheme: Scheme) -> dict[str, Any]:
    """The same step in plain PyTorch, every linear layer by its formula."""
    plain = PlainGPT(recipe.model, recipe.tokenizer.vocab_size)
    plain.load_state_dict(to_hugging_face(start, recipe.model, "llama"), strict=False)

    def forward(name: str, module: torch.nn.Linear) -> Any:
        def computed(inputs: torch.Tensor) -> torch.Tensor:
            weight = module.weight
            if name.startswith(("model.layers.0.mlp.gate", "model.layers.0.mlp.up")):
                return F.linear(inputs, weight, module.bias)
            if scheme.activations == "token":
                inputs = inputs + (rounded_inputs(inputs.detach()) - inputs).detach()
            if scheme.activations == "tensor":
                made, passed = rounded_inputs(inputs.detach(), torch.tensor([STATIC])), inputs * (inputs.abs() <= STATIC * 127.5)
                inputs = passed + (made - passed).detach()
            made = rounded(weight.detach(), weight_scales(weight.detach(), scheme, torch.float32), scheme)
            return F.linear(inputs, weight + (made - weight).detach(), module.bias)

        return computed

    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("_proj"):
            module.forward = forward(name, module)  # type: ignore[method-assign]
    batch = global_batch(recipe)

    def loss() -> torch.Tensor:
        losses = F.cross_entropy(plain(batch.tokens).flatten(0, 1), batch.labels.flatten(), reduction="none")
        return (losses * batch.loss_mask.flatten()).sum()

    total = loss()
    (total / batch.loss_mask.sum()).backward()
    weights = {name: parameter - 0.1 * parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    return {"loss": (total / batch.loss_mask.sum()).item(), "weights": weights}


@pytest.mark.parametrize("shape", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_step_by_its_formula(ranks: Any, scheme: Scheme, shape: dict[str, Any]) -> None:
    recipe = sgd_recipe(model={**shape, "num_layers": 2})
    found = ranks(1).run(stepped, recipe, scheme)[0]
    expected = plainly(recipe, found["start"], scheme)
    # Where sums come out in another order, an activation may be rounded to the next integer.
    loose = 20 if scheme.activations == "token" else 1
    assert found["loss"] == pytest.approx(expected["loss"], rel=loose * 1e-6)
    # A key's bias adds the same to all scores of a query: its gradient is noise.
    theirs = {name: tensor.detach() for name, tensor in expected["weights"].items() if not name.endswith("k_proj.bias")}
    ours = to_hugging_face(found["weights"], recipe.model, "llama")
    before = to_hugging_face(found["start"], recipe.model, "llama")
    steps = ({name: held[name] - before[name] for name in theirs} for held in (ours, theirs))
    assert_same(*steps, loose * 2e-4)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"parallel": TP2}),
    "TP2, SP, recomputed": (
        2,
        {
            "parallel": TP2_SP,
            "train": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        },
    ),
    "PP2": (2, {"parallel": PP2, "deepspeed": "ds_configs/zero1.json"}),
    "DP2, ZeRO 1": (2, {"deepspeed": "ds_configs/zero1.json"}),
    "DP2, ZeRO 2": (2, {"deepspeed": "ds_configs/zero2.json"}),
    "DP2, ZeRO 3": (2, {"deepspeed": "ds_configs/zero3.json"}),
}


@pytest.mark.parametrize("scheme", [SCHEMES["W8A8"], SCHEMES["W8A8 static"], SCHEMES["W4A16"]], ids=["W8A8", "W8A8 static", "W4A16"])
def test_alike_at_every_layout(ranks: Any, scheme: Scheme) -> None:
    one = ranks(1).run(stepped, sgd_recipe(), scheme)[0]
    for name, (world, sections) in LAYOUTS.items():
        other = ranks(world).run(stepped, sgd_recipe(**sections), scheme)[0]
        # An activation that another order of sums rounds to the next integer changes a little; a wrong scale changes much.
        tolerance = 2e-3 if scheme.activations else 1e-5
        assert other["loss"] == pytest.approx(one["loss"], rel=tolerance), name
        assert other["after"] == pytest.approx(one["after"], rel=2e-3), name  # a weight that was stepped may round otherwise
        steps = [{key: held["weights"][key] - held["start"][key] for key in one["start"]} for held in (other, one)]
        assert_same(*steps, 30 * tolerance)


def test_a_group_on_two_ranks_is_bad_input(ranks: Any) -> None:
    with pytest.raises(AssertionError, match=r"quantize.group_size 32 does not divide 48, the inputs of decoder.layers.0.mlp.linear_fc2"):
        ranks(2).run(stepped, sgd_recipe(parallel=TP2), Scheme(4, group_size=32))


def of_one_shard(ranks: RankContext, recipe: Recipe, scheme: Scheme) -> dict[str, Any]:
    """What a row-parallel layer multiplies for this rank's part of the inputs, and the same from the whole."""
    with model_on(ranks, recipe) as model:
        linear = linears(model.chunk, model.shards, model.groups)[0][3]
        assert linear.split_input
        (shard,) = linear.shards
        whole = torch.randn(5, 3, linear.shape[1], generator=torch.Generator().manual_seed(1)) ** 3
        part = shard.block[1]
        linear.module._forward_impl = lambda input, weight: (input, weight)  # type: ignore[assignment]
        round_in(linear.module, model.groups, True, weights=scheme)
        inputs, weight = linear.module._forward_impl(whole[..., part].contiguous(), linear.module.weight)  # type: ignore[operator]
        matrix = linear.whole()
        exact = rounded(matrix, weight_scales(matrix, scheme, torch.float32), scheme)
        return {"inputs": (inputs, rounded_inputs(whole)[..., part]), "weight": (weight.detach(), exact[:, part])}


def test_ranks_that_split_the_inputs_agree_on_scales(ranks: Any) -> None:
    for found in ranks(2).run(of_one_shard, at(tiny_recipe(), 2), SCHEMES["W8A16"]):
        for ours, theirs in found.values():
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
