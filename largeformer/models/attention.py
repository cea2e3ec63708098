"""Attention by PyTorch's `scaled_dot_product_attention`, in the place of Megatron-core's core attention.

Megatron-core's local attention materialises the s x s scores and knows no flash kernel; this one uses whichever fused
kernel PyTorch has for the device. `s` sequence, `b` micro batch, `n` this rank's heads, `g` its query groups, `d` head size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


class ScaledDotProductAttention(torch.nn.Module):
    """A `core_attention` for Megatron-core's layer specs. Has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__()
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        # Under sequence parallelism the whole layer already runs in the forked random state.
        self.fork_for_dropout = not config.sequence_parallel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """query: [s, b, n, d]; key, value: [s_k, b, g, d]; attention_mask: bool, True where masked, broadcast to [b, n, s, s_k]; one
        that is given stands alone, so it must mask later tokens too where the type is causal.

        Returns: [s, b, n * d].
        """
        assert attention_bias is None and packed_seq_params is None, "neither is produced by this package"
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        causal = mask_type is AttnMaskType.causal and attention_mask is None and query.shape[0] > 1
        dropout = self.dropout if self.training else 0.0
        fork = get_cuda_rng_tracker().fork() if dropout > 0.0 and self.fork_for_dropout else contextlib.nullcontext()
        with fork:
            context = F.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=key.shape[2] != query.shape[2],
            )
        s, b = query.shape[:2]
        return context.permute(2, 0, 1, 3).reshape(s, b, -1)
