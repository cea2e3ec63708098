"""Initial weights that depend on the seed and the parameter's global name, never on the layout.

Every rank draws the whole of a parameter from a generator seeded by its name and keeps its part: one parameter at a time, so
the cost is one full parameter of memory. The distribution is that of GPT-2 and Megatron: normal with `init_method_std`,
divided by sqrt(2 * layers) for projections that write to the residual stream (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from largeformer.config.schema import ModelConfig
from largeformer.models.shards import Shard

_RESIDUAL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def initialize(shards: Sequence[Shard], seed: int, model: ModelConfig) -> None:
    """Fill the parameters of this rank in place."""
    for shard in shards:
        values = shard.of(shard.parameter.data)
        if "norm" in shard.key and shard.key.endswith("weight"):
            values.fill_(1.0)
        elif "bias" in shard.key.rsplit(".", 1)[-1]:  # `bias_w` and `bias_v` are SwiGLU's halves
            values.zero_()
        else:
            std = model.init_method_std / (math.sqrt(2.0 * model.num_layers) if shard.key.endswith(_RESIDUAL) else 1.0)
            whole = torch.empty(shard.global_shape, dtype=torch.float32, device=values.device)
            whole.normal_(0.0, std, generator=generator_for(seed, shard.key, values.device))
            values.copy_(whole[shard.block])


def generator_for(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator on `device` that depends on the seed and the name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
