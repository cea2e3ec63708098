"""GPT in plain PyTorch: one process, no Megatron-core. What an engineer would write by hand for this shape.

`bench` measures against it, and it computes what `models/gpt.py` computes. Modules are named as in Hugging Face's Llama, and
`models/hf_mapping.py` translates weights to and from these names.

`b` batch, `s` sequence, `h` hidden, `n` heads, `g` query groups, `d` head size, `v` vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from largeformer.config.schema import ModelConfig


class PlainGPT(nn.Module):
    """A causal decoder with its output projection, over exactly `vocab_size` ids (none of them padding)."""

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.model = Decoder(model, vocab_size)
        self.lm_head = nn.Linear(model.hidden_size, vocab_size, bias=False)
        self._initialize(model)
        if model.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None, loss_mask: torch.Tensor | None = None) -> torch.Tensor:
        """tokens, labels: int64[b, s]; loss_mask: float32[b, s], all ones where not given.

        Returns: logits [b, s, v]; with labels float32[], the summed loss in nats.
        """
        logits = self.lm_head(self.model(tokens))
        if labels is None:
            return logits
        if loss_mask is None:
            return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
        return (losses * loss_mask.flatten()).sum()

    @torch.no_grad()
    def _initialize(self, model: ModelConfig) -> None:
        """Normal with `init_method_std`; what writes to the residual stream is divided by sqrt(2 * layers) (GPT-2)."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                module.weight.normal_(0.0, model.init_method_std / (math.sqrt(2.0 * model.num_layers) if residual else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()


class Decoder(nn.Module):
    """Embeddings, layers and the final norm: int64[b, s] -> [b, s, h]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, model.hidden_size)
        self.embed_positions = nn.Embedding(model.seq_length, model.hidden_size) if model.position_embedding == "learned" else None
        self.dropout = nn.Dropout(model.hidden_dropout)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.num_layers))
        self.norm = norm(model)
        self.rotary = model.position_embedding == "rope"
        if self.rotary:
            cos, sin = rotary_tables(model.seq_length, model.head_dim, model.rotary_base)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        hidden = self.embed_tokens(tokens)
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions.weight[:length]
        hidden = self.dropout(hidden)
        rotary = (self.cos[:length], self.sin[:length]) if self.rotary else None
        for layer in self.layers:
            hidden = layer(hidden, rotary)
        return self.norm(hidden)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream [b, s, h]."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = norm(model)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = norm(model)
        self.mlp = SwiGLU(model) if model.activation == "swiglu" else GELU(model)
        self.dropout = nn.Dropout(model.hidden_dropout)

    def forward(self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        hidden = hidden + self.dropout(self.self_attn(self.input_layernorm(hidden), rotary))
        return hidden + self.dropout(self.mlp(self.post_attention_layernorm(hidden)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Causal self-attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        heads, groups, size = model.num_attention_heads, model.query_groups, model.head_dim
        bias = model.add_bias_linear or model.add_qkv_bias
        self.head_dim, self.grouped, self.dropout = size, heads != groups, model.attention_dropout
        self.q_proj = nn.Linear(model.hidden_size, heads * size, bias=bias)
        self.k_proj = nn.Linear(model.hidden_size, groups * size, bias=bias)
        self.v_proj = nn.Linear(model.hidden_size, groups * size, bias=bias)
        self.o_proj = nn.Linear(heads * size, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0, enable_gqa=self.grouped
        )
        return self.o_proj(context.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=model.add_bias_linear)
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=model.add_bias_linear)
        self.down_proj = nn.Linear(model.ffn_size, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


class GELU(nn.Module):
    """down(gelu(up(x))), exact or with the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if model.activation == "gelu_tanh" else "none"
        self.up_proj = nn.Linear(model.hidden_size, model.ffn_size, bias=model.add_bias_linear)
        self.down_proj = nn.Linear(model.ffn_size, model.hidden_size, bias=model.add_bias_linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.up_proj(hidden), approximate=self.approximate))  # type: ignore[no-any-return]


def norm(model: ModelConfig) -> nn.Module:
    """The normalisation that the shape names, over h."""
    kind = nn.RMSNorm if model.normalization == "RMSNorm" else nn.LayerNorm
    return kind(model.hidden_size, eps=model.norm_epsilon)


def rotary_tables(seq_length: int, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, float32[s, d], of rotary positions (Su et al. 2021, arXiv:2104.09864), halves paired as in Llama."""
    angles = torch.outer(torch.arange(seq_length, dtype=torch.float32), rotary_frequencies(head_dim, base)).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotary_frequencies(head_dim: int, base: float) -> torch.Tensor:
    """Radians for each position, float32[d / 2], by the expression of Megatron-core and transformers: a far position multiplies what the
    last bits differ in."""
    return 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))  # type: ignore[no-any-return]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """heads: [b, n, s, d]; cos, sin: [s, d]. Turns each pair (i, i + d/2) by its angle."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
