"""Importance against a plain model, what stays alike at every layout, and a cut model that computes what is left of the whole one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from largeformer.compression.pruning.importance import Importance, by_ablation, from_activations, from_weights
from largeformer.compression.pruning.structured import Kept, choose, cut, cut_shape, new_names
from largeformer.config.schema import ModelConfig, Recipe
from largeformer.models.gather import gather_full, load_full
from largeformer.models.gpt import build_gpt
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.models.plain import PlainGPT
from largeformer.parallel.batch import Batch
from tests.compression.models import Model, at, model_on
from tests.distributed import RankContext
from tests.recipes import GPT2, LLAMA, tiny_recipe

ROWS = 4
LAYERS, FFN, HEADS, HIDDEN = 4, 96, 4, 64
STYLES = {
    "llama": LLAMA,
    "llama, multi-head, biases": {**LLAMA, "num_query_groups": None, "add_qkv_bias": True},
    "llama, tied": {**LLAMA, "tie_embeddings": True},
    "gpt2": GPT2,
}


class Held:
    """Tensors in memory, as the functions read stored ones."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].clone()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype


def held(model: Model) -> Held:
    """All weights, on rank 0."""
    return Held(gather_full(model.shards, lambda shard: shard.of(shard.parameter).clone()))


def plain(weights: Held, shape: ModelConfig, vocabulary: int) -> PlainGPT:
    reference = PlainGPT(shape, vocabulary).eval()
    state = to_hugging_face({name: weights.read(name) for name in weights.names}, shape, "llama")
    if shape.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state)
    return reference


def measured(ranks: RankContext, recipe: Recipe, removed: int) -> tuple[Importance, Any, Held]:
    with model_on(ranks, recipe) as model:
        batches = model.batches(recipe, ROWS)
        found = from_activations(model.chunk, batches, model.groups, recipe.model)
        return found, by_ablation(model.chunk, batches, model.groups, removed), held(model)


def by_the_definition(reference: PlainGPT, shape: ModelConfig, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Importance of a plain model, by its modules' inputs and outputs on all samples at once. `energy`: each channel's part of what a norm
    divides by, a mean over tokens."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, of_input: bool) -> Any:
        return lambda module, inputs, output: seen.update({name: (inputs[0] if of_input else output).double()})

    for index, layer in enumerate(reference.model.layers):
        layer.mlp.down_proj.register_forward_hook(note(f"ffn{index}", True))
        layer.self_attn.o_proj.register_forward_hook(note(f"heads{index}", True))
        layer.input_layernorm.register_forward_hook(note(f"norm{index}a", False))
        layer.post_attention_layernorm.register_forward_hook(note(f"norm{index}b", False))
        layer.register_forward_hook(note(f"in{index}", True))
        layer.register_forward_hook(note(f"out{index}", False))
    norms = [norm for layer in reference.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for index, norm in enumerate([*norms, reference.model.norm]):
        norm.register_forward_hook(note(f"normed{index}", True))
    with torch.no_grad():
        reference(torch.cat([batch.tokens for batch in batches]))
    layers = range(shape.num_layers)

    def over_samples(values: torch.Tensor) -> torch.Tensor:
        return values.square().mean(1).sum(0).sqrt()

    def shares(inputs: torch.Tensor) -> torch.Tensor:
        squares = (inputs - inputs.mean(-1, keepdim=True) if shape.normalization == "LayerNorm" else inputs).square()
        return (squares / squares.sum(-1, keepdim=True)).mean(dim=(0, 1))

    heads = [seen[f"heads{index}"].unflatten(-1, (shape.num_attention_heads, -1)).norm(dim=-1) for index in layers]
    return {
        "ffn": torch.stack([over_samples(seen[f"ffn{index}"]) for index in layers]),
        "heads": torch.stack([over_samples(values) for values in heads]),
        "hidden": sum((over_samples(seen[f"norm{index}{which}"]) for index in layers for which in "ab"), torch.zeros(shape.hidden_size)),
        "layers": torch.stack([1 - torch.cosine_similarity(seen[f"in{index}"], seen[f"out{index}"], dim=-1).mean() for index in layers]),
        "energy": torch.stack([shares(seen[f"normed{index}"]) for index in range(2 * shape.num_layers + 1)]),
    }


@pytest.mark.parametrize("style", [pytest.param(LLAMA, id="llama"), pytest.param(GPT2, id="gpt2")])
def test_importance_is_that_of_the_definition_at_every_layout(ranks: Any, style: dict[str, Any]) -> None:
    recipe = tiny_recipe(model=style)
    found, (rise, gone), weights = ranks(1).run(measured, recipe, 2)[0]
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(recipe.tokenizer.vocab_size, (ROWS, recipe.model.seq_length + 1), generator=generator)
    batches = [Batch(row[None, :-1], row[None, 1:], torch.ones(1, 32), torch.arange(32)[None]) for row in ids]
    reference = plain(weights, recipe.model, recipe.tokenizer.vocab_size)
    for name, expected in by_the_definition(reference, recipe.model, batches).items():
        torch.testing.assert_close(getattr(found, name), expected.double(), rtol=1e-4, atol=1e-7, msg=name)
    for world, tensor in ((2, 2), (2, 1)):
        other, (other_rise, other_gone), _ = ranks(world).run(measured, at(recipe, tensor), 2)[0]
        for name in ("ffn", "heads", "hidden", "layers", "energy"):
            torch.testing.assert_close(getattr(other, name), getattr(found, name), rtol=1e-4, atol=1e-7, msg=f"{name} at TP{tensor}")
        assert other_gone == gone
        torch.testing.assert_close(other_rise, rise, rtol=1e-4, atol=1e-6, equal_nan=True)
    losses = loss_without(reference, ids, []), [loss_without(reference, ids, [index]) for index in range(LAYERS)]
    assert gone[0] == min(range(LAYERS), key=lambda index: losses[1][index])
    assert rise[gone[0]] == pytest.approx(losses[1][gone[0]] - losses[0], abs=1e-5)
    assert rise[gone[1]] == pytest.approx(loss_without(reference, ids, gone) - losses[0], abs=1e-5)


def loss_without(reference: PlainGPT, ids: torch.Tensor, gone: list[int]) -> float:
    layers = reference.model.layers
    reference.model.layers = torch.nn.ModuleList(layer for index, layer in enumerate(layers) if index not in gone)
    try:
        with torch.no_grad():
            return float(reference(ids[:, :-1], ids[:, 1:])) / ids[:, 1:].numel()
    finally:
        reference.model.layers = layers


@torch.no_grad()
def test_norms_of_weights(ranks: Any) -> None:
    recipe = tiny_recipe(model=LLAMA)
    weights = ranks(1).run(measured, recipe, 0)[0][2]
    found = from_weights(weights, recipe.model)
    layer = plain(weights, recipe.model, recipe.tokenizer.vocab_size).model.layers[1]
    mlp, attention = layer.mlp, layer.self_attn
    channel = torch.cat([mlp.gate_proj.weight[5], mlp.up_proj.weight[5], mlp.down_proj.weight[:, 5]])
    head = torch.cat([attention.q_proj.weight[32:48].flatten(), attention.o_proj.weight[:, 32:48].flatten()])
    assert float(found.ffn[1, 5]) == pytest.approx(float(channel.norm()), rel=1e-5)
    assert float(found.heads[1, 2]) == pytest.approx(float(head.norm()), rel=1e-5)
    assert float(found.layers[1]) == pytest.approx(float(torch.cat([p.flatten() for p in layer.parameters()]).norm()), rel=1e-5)


DEAD: dict[str, dict[str, Any]] = {
    "ffn": {"ffn_hidden_size": 72},
    "heads": {"num_attention_heads": 2},
    "layers": {"num_layers": 3},
    "hidden": {"hidden_size": 48},
    "all": {"ffn_hidden_size": 72, "num_attention_heads": 2, "num_layers": 3, "hidden_size": 48},
}

WRITERS = ("linear_proj.weight", "linear_fc2.weight", "linear_proj.bias", "linear_fc2.bias")
"""What adds to the hidden states, a row for each channel."""


def kill(model: Model, shape: ModelConfig) -> None:
    """Channels 3, 7, 11, ... of the feed-forward layers, the hidden channels alike, half the heads and the second layer give nothing.
    Before a LayerNorm the other hidden channels sum to 0, as the dead ones do: so the mean that it takes away is the same without them."""
    per_group = shape.num_attention_heads // shape.query_groups
    # With queries that share a value no head is silent alone: its query is, and its part of the projection.
    heads = [1, 3] if per_group == 1 else [1, 2]
    d = shape.head_dim
    columns = torch.cat([torch.arange(head * d, (head + 1) * d) for head in heads])
    every_fourth = torch.arange(3, 96, 4)
    for shard in model.shards:
        name, whole = shard.key, torch.ones(shard.global_shape)
        hidden = every_fourth[every_fourth < shape.hidden_size]
        if "linear_fc1" in name:
            whole[every_fourth] = 0
        elif name.endswith("linear_fc2.weight"):
            whole[:, every_fourth] = 0
        elif name.endswith("linear_proj.weight"):
            whole[:, columns] = 0
        elif "linear_qkv" in name:
            rows = whole.view(shape.query_groups, per_group + 2, d, *whole.shape[1:])
            for head in heads:
                rows[head // per_group, head % per_group] = 0
                if per_group == 1:
                    rows[head // per_group, 1:] = 0
        if name.startswith("embedding") or name.startswith("output_layer"):
            whole[:, hidden] = 0
        elif name.endswith((*WRITERS, "layernorm.bias")):
            whole[hidden] = 0
        if "layers.1." in name and ("linear_proj" in name or "linear_fc2" in name):
            whole[:] = 0
        with torch.no_grad():
            mine = shard.of(shard.parameter.data)
            mine.mul_(whole[shard.block])
            if shape.normalization == "LayerNorm" and name.startswith("embedding"):
                centre(mine, hidden)
            elif shape.normalization == "LayerNorm" and name.endswith(WRITERS):
                centre(mine.T if mine.dim() == 2 else mine, hidden)


def centre(rows: torch.Tensor, dead: torch.Tensor) -> None:
    """rows: [..., hidden]."""
    alive = torch.ones(rows.shape[-1], dtype=torch.bool)
    alive[dead] = False
    rows[..., alive] -= rows[..., alive].mean(-1, keepdim=True)


def logits_before_and_after(ranks: RankContext, recipe: Recipe, sizes: dict[str, int], by_weight: bool) -> tuple[float, Kept]:
    """The largest difference of logits between a model with dead parts and the same cut to `sizes`, and what was kept."""
    with model_on(ranks, recipe) as model:
        kill(model, recipe.model)
        batches = model.batches(recipe, ROWS)
        whole = held(model)
        found = from_activations(model.chunk, batches, model.groups, recipe.model)
        if by_weight and ranks.rank == 0:
            found = dataclasses.replace(found, heads=from_weights(whole, recipe.model).heads)
        sizes = {"num_query_groups": recipe.model.query_groups, **sizes}
        if recipe.model.query_groups == recipe.model.num_attention_heads and "num_attention_heads" in sizes:
            sizes["num_query_groups"] = sizes["num_attention_heads"]
        after = recipe.model.model_copy(update={"kv_channels": recipe.model.head_dim, "ffn_hidden_size": recipe.model.ffn_size, **sizes})
        smaller = recipe.model_copy(update={"model": after})
        (chunk,), shards = build_gpt(smaller, model.groups, torch.device("cpu"))
        kept = [None]
        state: list[Any] = [None]
        if ranks.rank == 0:
            kept[0] = choose(found, recipe.model, after)  # type: ignore[call-overload]
            made = {name: cut(whole, kept[0], found, {}, recipe.model, name) for name in new_names(whole, kept[0])}  # type: ignore[arg-type]
            for name, tensor in made.items():
                assert (tuple(tensor.shape), tensor.dtype) == cut_shape(whole, kept[0], recipe.model, name)  # type: ignore[arg-type]
            state[0] = made
        torch.distributed.broadcast_object_list(state)
        load_full(shards, state[0])
        chunk.eval()
        distances = []
        with torch.no_grad():
            for batch in batches:
                pair = [gpt(batch.tokens, batch.position_ids, None) for gpt in (model.chunk, chunk)]
                distances.append((pair[0] - pair[1]).abs().max() / pair[0].abs().max())
        return float(torch.stack(distances).max()), kept[0]  # type: ignore[return-value]


@pytest.mark.parametrize("part", DEAD)
@pytest.mark.parametrize("style", STYLES)
def test_without_dead_parts_a_model_computes_the_same(ranks: Any, style: str, part: str) -> None:
    # A norm's epsilon counts by channel, and so for more where there are fewer.
    recipe, sizes = tiny_recipe(model={**STYLES[style], "norm_epsilon": 1e-12}), dict(DEAD[part])
    by_weight = recipe.model.query_groups != recipe.model.num_attention_heads
    worst, kept = ranks(1).run(logits_before_and_after, recipe, sizes, by_weight)[0]
    assert worst < 1e-5
    if "num_layers" in sizes:
        assert kept.layers == [0, 2, 3]
    if "ffn_hidden_size" in sizes:
        assert all(set(ffn) == {i for i in range(FFN) if i % 4 != 3} for ffn in kept.ffn)
    if part == "all":
        other_worst, other = ranks(2).run(logits_before_and_after, at(recipe, 2), sizes, by_weight)[0]
        assert other_worst < 1e-5 and other == kept


def test_of_equal_ones_the_first_stay_and_groups_lose_alike() -> None:
    before = tiny_recipe(model={"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 8}).model
    heads = torch.tensor([[1.0, 2, 9, 8, 3, 3, 0, 7]]).repeat(LAYERS, 1)
    found = Importance(torch.ones(LAYERS, FFN), heads, torch.ones(HIDDEN), torch.arange(LAYERS))
    kept = choose(found, before, before.model_copy(update={"num_attention_heads": 4, "ffn_hidden_size": 8, "num_layers": 2}))
    assert kept.heads[0] == [1, 2, 4, 7] and kept.ffn[0] == list(range(8)) and kept.layers == [2, 3]
    fewer = choose(found, before, before.model_copy(update={"num_attention_heads": 2, "num_query_groups": 2}))
    assert fewer.groups[0] == [1, 3] and fewer.heads[0] == [2, 7]
