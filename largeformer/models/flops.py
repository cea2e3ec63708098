"""Parameters and FLOPs of a GPT by formula, and the peak that MFU compares with. Importing it does not import torch.

Only matrix products count, two FLOPs a multiply-add, and a training step is three forward passes: one forward, two backward.
Attention scores are counted in full, not halved for the causal mask, and recomputation is not counted: model FLOPs
as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and Megatron-LM (Narayanan et al. 2021, arXiv:2104.04473,
appendix), so that an MFU compares with published ones. For multi-head attention, an MLP of 4h and `N` matrix parameters this
is PaLM's `6N + 12 l h s` a token; here grouped queries and gated MLPs are exact too.

h hidden size, s sequence, v vocabulary (padding is no work of the model's, and not counted), f width of the
MLP, l layers, q = heads x head size, k = query groups x head size
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from largeformer.config.schema import ModelConfig

if TYPE_CHECKING:
    import torch

TRAINING_PASSES = 3
"""Forward passes' worth of work in a step: the backward pass multiplies twice for each product of the forward."""


def forward_flops_per_token(model: ModelConfig, vocab: int) -> int:
    """FLOPs of one forward pass, a token, in a sequence of `seq_length`."""
    h, s, f = model.hidden_size, model.seq_length, model.ffn_size
    q, k = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    projections = 2 * h * (q + 2 * k) + 2 * q * h
    scores = 2 * s * q + 2 * s * q  # queries x keys, then probabilities x values
    mlp = 2 * h * f * (3 if model.activation == "swiglu" else 2)
    return model.num_layers * (projections + scores + mlp) + 2 * h * vocab


def flops_per_token(model: ModelConfig, vocab: int) -> int:
    """FLOPs of one training step, a token, of the whole model."""
    return TRAINING_PASSES * forward_flops_per_token(model, vocab)


def parameter_count(model: ModelConfig, vocab: int) -> int:
    """Parameters of the whole model, with `vocab` rows in its embedding."""
    h, f = model.hidden_size, model.ffn_size
    q, k = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
    norm = h * (2 if model.normalization == "LayerNorm" else 1)
    up = f * (2 if model.activation == "swiglu" else 1)
    weights = h * (q + 2 * k) + q * h + h * up + f * h
    biases = (h + up + h) if model.add_bias_linear else 0
    if model.add_bias_linear or model.add_qkv_bias:
        biases += q + 2 * k
    embeddings = vocab * h * (1 if model.tie_embeddings else 2)
    positions = model.seq_length * h if model.position_embedding == "learned" else 0
    return embeddings + positions + model.num_layers * (weights + biases + 2 * norm) + norm


# name pattern, TFLOP/s for bf16 and fp16, TFLOP/s for fp32 matrices; dense, by the vendors' data sheets. fp32 is true fp32, as
# PyTorch computes unless it is told to round to TF32. The first match wins.
_PEAK_TFLOPS: tuple[tuple[str, float, float], ...] = (
    (r"\bGB200\b", 2500.0, 80.0),
    (r"\bB200\b", 2250.0, 75.0),
    (r"\bH200 NVL\b", 835.5, 60.0),
    (r"\bH200\b", 989.4, 67.0),
    (r"\bGH200\b", 989.4, 67.0),
    (r"\bH100 PCIe\b", 756.0, 51.0),
    (r"\bH100 NVL\b", 835.5, 60.0),
    (r"\bH[18]00\b", 989.4, 67.0),
    (r"\bA[18]00\b", 312.0, 19.5),
    (r"\bA40\b", 149.7, 37.4),
    (r"\bA30\b", 165.0, 10.3),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bL40\b", 181.0, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bRTX 4090$", 165.2, 82.6),
    (r"\bRTX 3090$", 71.0, 35.6),
    (r"\bV100\b", 125.0, 15.7),
    (r"\bT4\b", 65.0, 8.1),
    (r"\bMI300X\b", 1307.4, 163.4),
)


def known_peak_flops(gpu_name: str, precision: str) -> float | None:
    """Dense peak of a GPU in FLOP/s at `precision` (bf16, fp16, fp32); None for one not in the table, or for a MIG slice of one."""
    if "MIG" in gpu_name:
        return None
    for pattern, half, full in _PEAK_TFLOPS:
        if re.search(pattern, gpu_name, re.IGNORECASE):
            return (full if precision == "fp32" else half) * 1e12
    return None


def peak_flops(precision: str, device: torch.device) -> float:
    """FLOP/s that MFU is measured against: the data sheet's for a known GPU, else what a matrix product reaches here."""
    import torch

    known = known_peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return known or measure_peak_flops(dtypes[precision], device)


def measure_peak_flops(dtype: torch.dtype, device: torch.device, budget_s: float = 0.5) -> float:
    """Best FLOP/s of square matrix products, within about `budget_s` seconds.

    The products grow while they are fast, and are repeated once they are not: whatever disturbs a few of them (a first call,
    a busy neighbour) does not decide the result.
    """
    import torch

    deadline = time.perf_counter() + budget_s
    size, largest, best = 256, 8192, 0.0
    own = torch.Generator(device)  # what is drawn here is not missing in the training
    left, right = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    while (start := time.perf_counter()) < deadline:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best = max(best, 2 * size**3 / seconds)
        if size < largest and 8 * seconds < budget_s / 4:  # twice the size takes eight times as long
            size *= 2
            left, right = left.repeat(2, 2), right.repeat(2, 2)
    return best
