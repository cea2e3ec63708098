"""The same weights in Hugging Face's models and in ours, one process, fp32, no dropout: logits and gradients agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from largeformer.config.schema import ModelConfig, Recipe
from largeformer.errors import BadInputError
from largeformer.models.gather import load_full
from largeformer.models.hf_config import architecture, hugging_face_config, model_of
from largeformer.models.hf_mapping import from_hugging_face, to_hugging_face, zeros
from tests.one_process import Built, random_batch, relative_difference
from tests.recipes import GPT2, LLAMA, tiny_recipe

transformers = pytest.importorskip("transformers")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied": {**LLAMA, "tie_embeddings": True},
    "llama, one group, wide heads": {**LLAMA, "num_query_groups": 1, "kv_channels": 24, "rotary_base": 500000.0},
    "llama, every head its own keys": {**LLAMA, "num_query_groups": None},
    "llama, biases": {**LLAMA, "add_bias_linear": True, "add_qkv_bias": True},
    "llama, biases of queries, keys and values": {**LLAMA, "add_qkv_bias": True},
    "gpt2": GPT2,
    "gpt2, untied, exact gelu": {**GPT2, "tie_embeddings": False, "activation": "gelu"},
}


def hugging_face_model(model: ModelConfig, vocab_size: int) -> Any:
    config = transformers.AutoConfig.for_model(**hugging_face_config(model, vocab_size))
    twin = getattr(transformers, architecture(model).name)(config)
    return twin.eval()


def perturb(built: Built) -> None:
    """Move every parameter, so that no bias is zero and no norm is one: a part that is left out shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for shard in built.shards:
            block = shard.of(shard.parameter)
            block += 0.1 * torch.randn(block.shape, generator=generator)


@pytest.mark.parametrize("backend", ["sdpa", "local"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients(name: str, backend: str, one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(model={**SHAPES[name], "attention_backend": backend})
    vocab_size = recipe.tokenizer.vocab_size
    built = one_process(recipe)
    perturb(built)
    twin = hugging_face_model(recipe.model, vocab_size)
    missing, unexpected = twin.load_state_dict(to_hugging_face(built.weights(), recipe.model), strict=False)
    assert set(missing) == ({"lm_head.weight"} if recipe.model.tie_embeddings else set())
    assert not unexpected
    twin.tie_weights()
    batch = random_batch(vocab_size, 2, recipe.model.seq_length)

    ours = built.model(batch.tokens, batch.position_ids, None)[..., :vocab_size]
    theirs = twin(batch.tokens).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)

    built.model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask).backward()
    losses = F.cross_entropy(theirs.flatten(0, 1), batch.labels.flatten(), reduction="none")
    (losses * batch.loss_mask.flatten()).sum().backward()
    held = zeros(recipe.model)  # what theirs has and ours has not
    expected = {name: parameter.grad for name, parameter in twin.named_parameters() if name not in held}
    gradients = {name: gradient for name, gradient in to_hugging_face(built.gradients(), recipe.model).items() if name not in held}
    assert set(gradients) == set(expected)
    differences = {name: relative_difference(gradients[name], gradient) for name, gradient in expected.items()}
    assert {name: value for name, value in differences.items() if not value < 1e-4} == {}


@pytest.mark.parametrize("name", SHAPES)
def test_import_is_the_inverse_of_export(name: str, one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(model=SHAPES[name])
    twin = hugging_face_model(recipe.model, recipe.tokenizer.vocab_size)
    built = one_process(recipe)
    imported = from_hugging_face(twin.state_dict(), recipe.model, recipe.tokenizer.vocab_size)
    load_full(built.shards, imported)
    weights = built.weights()
    assert set(weights) == set(imported)
    exported = to_hugging_face(weights, recipe.model)
    state = twin.state_dict()
    for key, tensor in exported.items():
        assert torch.equal(tensor, state[key]), key
    tokens = random_batch(recipe.tokenizer.vocab_size, 1, 9)
    ours = built.model(tokens.tokens, tokens.position_ids, None)[..., : recipe.tokenizer.vocab_size]
    torch.testing.assert_close(ours, twin(tokens.tokens).logits, rtol=0, atol=1e-5)


def test_a_qwen2_is_read(one_process: Callable[[Recipe], Built]) -> None:
    llama = hugging_face_config(tiny_recipe(model=LLAMA).model, 250)
    twin = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**llama, "model_type": "qwen2"})).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model = model_of(twin.config.to_dict())
    recipe = tiny_recipe(model=model.model_dump(exclude={"attention_backend"}))
    assert recipe.model.add_qkv_bias and not recipe.model.add_bias_linear
    built = one_process(recipe)
    load_full(built.shards, from_hugging_face(twin.state_dict(), recipe.model, 250))
    tokens = random_batch(250, 1, 9)
    ours = built.model(tokens.tokens, tokens.position_ids, None)[..., :250]
    torch.testing.assert_close(ours, twin(tokens.tokens).logits, rtol=0, atol=1e-5)


def test_an_output_bias_that_our_attention_has_not_is_refused_unless_it_is_zero() -> None:
    model = tiny_recipe(model={**LLAMA, "add_qkv_bias": True}).model
    config = hugging_face_config(model, 250)
    assert (config["attention_bias"], config["mlp_bias"]) == (True, False)
    ours_alone = {"attention_backend", "make_vocab_size_divisible_by"}
    assert model_of(config).model_dump(exclude=ours_alone) == model.model_dump(exclude=ours_alone)
    state = hugging_face_model(model, 250).state_dict()
    assert {name for name in state if name.endswith("o_proj.bias")} == set(zeros(model))
    read = from_hugging_face(state, model, 250)
    assert not any(name.endswith("linear_proj.bias") for name in read)
    state["model.layers.1.self_attn.o_proj.bias"][3] = 1e-6
    with pytest.raises(BadInputError, match=r"model.layers.1.self_attn.o_proj.bias is not zero"):
        from_hugging_face(state, model, 250)


def test_gpt2_files_without_the_outer_name() -> None:
    recipe = tiny_recipe(model=GPT2)
    state = hugging_face_model(recipe.model, 250).state_dict()
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items() if name != "lm_head.weight"}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()  # the mask that old files carry
    with_name, without = (from_hugging_face(weights, recipe.model, 250) for weights in (state, bare))
    assert with_name.keys() == without.keys()
    assert all(torch.equal(with_name[name], without[name]) for name in without)


def test_import_names_everything_that_does_not_fit() -> None:
    recipe = tiny_recipe(model=LLAMA)
    state = dict(hugging_face_model(recipe.model, 250).state_dict())
    del state["model.norm.weight"]
    state["lm_head.weight"] = torch.zeros(251, 64)
    state["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(16)
    with pytest.raises(BadInputError) as raised:
        from_hugging_face(state, recipe.model, 250)
    text = "\n".join(raised.value.problems)
    assert "model.norm.weight is missing" in text
    assert "lm_head.weight has the shape [251, 64]; this model's is [250, 64]" in text
    assert "model.layers.0.self_attn.q_norm.weight has no place" in text
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({**LLAMA, "activation": "gelu"}, "model.activation is gelu"),
        ({**LLAMA, "position_embedding": "none"}, "model.position_embedding is none"),
        ({**GPT2, "add_bias_linear": False}, "model.add_bias_linear is False"),
        ({**GPT2, "position_embedding": "rope"}, "model.position_embedding is rope"),
        ({**GPT2, "num_query_groups": 2}, "num_query_groups"),
    ],
)
def test_a_shape_that_no_architecture_holds_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(BadInputError, match=named):
        architecture(tiny_recipe(model=changes).model)
