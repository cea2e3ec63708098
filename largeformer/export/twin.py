"""The model as ONNX can hold it: plain PyTorch with its keys and values handed in and out.

`models/plain.py` with a cache: the same modules, names and weights, so that what is true of one is true of the other. The inputs
and outputs are those that Hugging Face's Optimum gives a decoder, so that its clients run the file.

`b` batch, `s` new tokens, `p` tokens in the cache, `g` query groups, `n` heads, `d` head size, `h` hidden, `v` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from largeformer.config.schema import ModelConfig
from largeformer.models.plain import Attention, Layer, PlainGPT, rotate

Cache = tuple[torch.Tensor, torch.Tensor]


class CachedGPT(nn.Module):
    """A `PlainGPT` that continues from a cache. Shares the given model's modules."""

    def __init__(self, plain: PlainGPT, model: ModelConfig) -> None:
        super().__init__()
        self.plain = plain
        self.groups, self.repeats = model.query_groups, model.num_attention_heads // model.query_groups

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past_key_values: list[Cache]
    ) -> tuple[torch.Tensor, list[Cache]]:
        """input_ids, position_ids: int64[b, s]; attention_mask: int64[b, p + s], 0 where there is only padding; past_key_values:
        for each layer keys and values [b, g, p, d].

        Returns: logits [b, s, v], and the cache [b, g, p + s, d] of each layer.
        """
        decoder = self.plain.model
        hidden = decoder.embed_tokens(input_ids)
        if decoder.embed_positions is not None:
            hidden = hidden + decoder.embed_positions(position_ids)
        rotary = (decoder.cos[position_ids][:, None], decoder.sin[position_ids][:, None]) if decoder.rotary else None
        mask = self._mask(attention_mask, input_ids.shape[1])
        present = []
        for layer, cache in zip(decoder.layers, past_key_values, strict=True):
            hidden, cache = self._layer(layer, hidden, rotary, mask, cache)
            present.append(cache)
        return self.plain.lm_head(_normed(decoder.norm, hidden)), present

    @staticmethod
    def _mask(attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        """float32[b, 1, s, p + s], added to the scores: no key that comes later, none that is padding."""
        total = attention_mask.shape[1]
        keys = torch.arange(total)
        queries = keys[total - length :]
        seen = (keys[None, :] <= queries[:, None]) & (attention_mask[:, None, None, :] > 0)
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)

    def _layer(
        self, layer: nn.Module, hidden: torch.Tensor, rotary: Cache | None, mask: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        assert isinstance(layer, Layer)
        attended, cache = self._attention(layer.self_attn, _normed(layer.input_layernorm, hidden), rotary, mask, cache)
        hidden = hidden + attended
        return hidden + layer.mlp(_normed(layer.post_attention_layernorm, hidden)), cache

    def _attention(
        self, attention: Attention, hidden: torch.Tensor, rotary: Cache | None, mask: torch.Tensor, cache: Cache
    ) -> tuple[torch.Tensor, Cache]:
        size = attention.head_dim
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, size)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if rotary is not None:
            query, key = rotate(torch.cat([query, key], dim=1), *rotary).split([query.shape[1], key.shape[1]], dim=1)
        key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
        # The queries of a group stand below each other: one product with the keys of their group, none of them copied.
        b, s = hidden.shape[:2]
        grouped = query.reshape(b, self.groups, self.repeats * s, size)
        scores = (grouped * size**-0.5) @ key.transpose(2, 3)
        scores = scores.reshape(b, self.groups * self.repeats, s, -1) + mask
        weights = F.softmax(scores, dim=-1).to(value.dtype).reshape(b, self.groups, self.repeats * s, -1)
        context = (weights @ value).reshape(b, self.groups * self.repeats, s, size)
        return attention.o_proj(context.transpose(1, 2).flatten(2)), (key, value)


def _normed(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What `norm` gives, by the division that onnxruntime knows for one operation; exported as it is, an RMSNorm is seven."""
    if not isinstance(norm, nn.RMSNorm):
        return norm(hidden)  # type: ignore[no-any-return]
    assert norm.eps is not None
    return hidden / torch.sqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
