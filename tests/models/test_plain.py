"""The plain twin computes what our model computes, in every shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.models.flops import parameter_count
from largeformer.models.hf_mapping import to_hugging_face
from largeformer.models.plain import PlainGPT, rotary_frequencies, rotary_tables
from tests.models.test_hf_parity import perturb
from tests.one_process import Built, random_batch, relative_difference
from tests.recipes import GPT2, LLAMA, tiny_recipe

SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama, tied, wide heads": {**LLAMA, "tie_embeddings": True, "kv_channels": 24},
    "gpt2": GPT2,
    "no positions, LayerNorm, SwiGLU with biases": {"position_embedding": "none", "normalization": "LayerNorm", "add_bias_linear": True},
    "learned positions, RMSNorm, exact GELU": {"position_embedding": "learned", "activation": "gelu"},
    "biases on queries, keys and values alone": {"add_qkv_bias": True},
}


@pytest.mark.parametrize("name", SHAPES)
def test_equals_ours(name: str, one_process: Callable[[Recipe], Built]) -> None:
    recipe = tiny_recipe(model=SHAPES[name])
    vocab_size = recipe.tokenizer.vocab_size
    built = one_process(recipe)
    perturb(built)
    plain = PlainGPT(recipe.model, vocab_size)
    weights = to_hugging_face(built.weights(), recipe.model, style="llama")
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert set(missing) == ({"lm_head.weight"} if recipe.model.tie_embeddings else set())
    assert not unexpected
    assert sum(parameter.numel() for parameter in plain.parameters()) == parameter_count(recipe.model, vocab_size)
    batch = random_batch(vocab_size, 2, recipe.model.seq_length - 3)

    ours = built.model(batch.tokens, batch.position_ids, None)[..., :vocab_size]
    torch.testing.assert_close(plain(batch.tokens), ours, rtol=0, atol=1e-5)

    loss = built.model(batch.tokens, batch.position_ids, None, labels=batch.labels, loss_mask=batch.loss_mask)
    twin_loss = plain(batch.tokens, batch.labels, batch.loss_mask)
    torch.testing.assert_close(twin_loss, loss, rtol=1e-6, atol=0)
    loss.backward()
    twin_loss.backward()
    gradients = to_hugging_face(built.gradients(), recipe.model, style="llama")
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    assert set(gradients) == set(expected)
    differences = {name: relative_difference(gradients[name], gradient) for name, gradient in expected.items()}
    if recipe.model.position_embedding != "rope":
        # Softmax does not see a shift common to all keys: the gradient of a key's bias is rounding alone, unless keys are rotated.
        differences = {name: value for name, value in differences.items() if not name.endswith("k_proj.bias")}
    assert {name: value for name, value in differences.items() if not value < 1e-4} == {}


def test_no_mask_counts_every_label() -> None:
    recipe = tiny_recipe()
    plain = PlainGPT(recipe.model, 250)
    batch = random_batch(250, 2, 8)
    torch.testing.assert_close(plain(batch.tokens, batch.labels), plain(batch.tokens, batch.labels, torch.ones(2, 8)))


def test_dropout_is_of_training_alone() -> None:
    plain = PlainGPT(tiny_recipe(model={"hidden_dropout": 0.5, "attention_dropout": 0.5}).model, 250)
    tokens = random_batch(250, 1, 8).tokens
    assert not torch.equal(plain(tokens), plain(tokens))
    plain.eval()
    assert torch.equal(plain(tokens), plain(tokens))


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_positions_are_rotated_by_the_very_numbers_of_both_libraries(head_dim: int, base: float) -> None:
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    ours = rotary_frequencies(head_dim, base)
    megatron = RotaryEmbedding(head_dim, rotary_percent=1.0, rotary_base=base, use_cpu_initialization=True)  # type: ignore[arg-type]
    assert torch.equal(ours, megatron.inv_freq)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_theta=base)
    assert torch.equal(ours, transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq)
    cos, sin = rotary_tables(64, head_dim, base)
    angles = torch.arange(64.0)[:, None] * ours
    torch.testing.assert_close((cos, sin), (angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)), rtol=0, atol=0)
