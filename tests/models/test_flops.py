"""FLOPs and parameters against Hugging Face's models: the operations that PyTorch counts, the tensors that they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from largeformer.config.schema import ModelConfig
from largeformer.models.flops import flops_per_token, forward_flops_per_token, known_peak_flops, measure_peak_flops, parameter_count

VOCAB = 320
SHAPE = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 48}
LLAMA = {**SHAPE, "ffn_hidden_size": 176, "num_query_groups": 2}
GPT2 = {
    **SHAPE,
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "position_embedding": "learned",
    "add_bias_linear": True,
    "tie_embeddings": True,
}
CASES: dict[str, dict[str, Any]] = {
    "llama, grouped queries": LLAMA,
    "llama, one query group": {**LLAMA, "num_query_groups": 1},
    "llama, heads wider than h": {**LLAMA, "kv_channels": 32},
    "llama, tied": {**LLAMA, "tie_embeddings": True},
    "llama, biases": {**LLAMA, "add_bias_linear": True},
    "qwen2, biases of queries, keys and values": {**LLAMA, "add_qkv_bias": True},
    "gpt2": GPT2,
    "gpt2, narrow mlp": {**GPT2, "ffn_hidden_size": 96},
}


def reference(name: str, model: ModelConfig) -> torch.nn.Module:
    """The same shape by Hugging Face, with plain attention, which multiplies the whole of the scores."""
    common = {"vocab_size": VOCAB, "attn_implementation": "eager", "tie_word_embeddings": model.tie_embeddings, "use_cache": False}
    if name.startswith("gpt2"):
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=model.hidden_size,
                n_layer=model.num_layers,
                n_head=model.num_attention_heads,
                n_inner=model.ffn_size,
                n_positions=model.seq_length,
                **common,
            )
        )
    common |= {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "max_position_embeddings": model.seq_length,
    }
    if name.startswith("qwen2"):
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**common))
    bias = model.add_bias_linear
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(head_dim=model.head_dim, attention_bias=bias, mlp_bias=bias, **common))


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_reference(name: str) -> None:
    model = ModelConfig(**CASES[name])
    assert parameter_count(model, VOCAB) == sum(p.numel() for p in reference(name, model).parameters())


@pytest.mark.parametrize("name", CASES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    model = ModelConfig(**CASES[name])
    twin = reference(name, model)
    tokens = torch.zeros(1, model.seq_length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        logits = twin(tokens).logits
    forward = counter.get_total_flops()
    # Rotary angles are no part of the published formulas: positions x frequencies, head size / 2 of them.
    rotary = 2 * model.seq_length * (model.head_dim // 2) if model.position_embedding == "rope" else 0
    assert forward - rotary == forward_flops_per_token(model, VOCAB) * model.seq_length
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert forward - rotary + counter.get_total_flops() == flops_per_token(model, VOCAB) * model.seq_length


def test_the_formula_of_palm() -> None:
    """6 N + 12 l h s a token, N without embeddings, for an MLP of 4h (Chowdhery et al. 2022, appendix B)."""
    model = ModelConfig(num_layers=12, hidden_size=768, num_attention_heads=12, seq_length=1024, activation="gelu")
    matrices = 12 * 12 * 768**2 + 768 * 50304
    assert flops_per_token(model, 50304) == 6 * matrices + 12 * 12 * 768 * 1024


def test_parameters_of_published_models() -> None:
    gpt2 = ModelConfig(
        **{**GPT2, "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024},
    )
    llama_8b = ModelConfig(
        num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, seq_length=8192
    )
    assert parameter_count(gpt2, 50257) == 124_439_808
    assert parameter_count(llama_8b, 128256) == 8_030_261_248


@pytest.mark.parametrize(
    ("name", "bf16_tflops", "fp32_tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA GB200", 2500, 80),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA A10", 125, 31.2),
        ("Tesla V100-SXM2-32GB", 125, 15.7),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_by_name(name: str, bf16_tflops: float, fp32_tflops: float) -> None:
    assert known_peak_flops(name, "bf16") == pytest.approx(bf16_tflops * 1e12)
    assert known_peak_flops(name, "fp32") == pytest.approx(fp32_tflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "Quadro P620"])
def test_a_gpu_that_the_table_does_not_know_has_no_peak(name: str) -> None:
    assert known_peak_flops(name, "bf16") is None


def test_the_measured_peak_is_what_a_product_reaches() -> None:
    """A product cannot be faster than the peak by more than noise, nor the peak be what no processor has."""
    peak = measure_peak_flops(torch.float32, torch.device("cpu"), budget_s=0.1)
    assert 1e8 < peak < 1e14


def test_the_peak_is_measured_beside_the_random_numbers_of_the_training() -> None:
    before = torch.get_rng_state()
    assert measure_peak_flops(torch.float32, torch.device("cpu"), budget_s=0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)
