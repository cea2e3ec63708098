"""What the axes of each global tensor stand for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Axis = Literal["hidden", "ffn", "heads", "qkv", ""]

# `heads` are n x d columns, in the order of heads; `qkv` are rows, of each query group its queries, its key and its value.
_AXES: tuple[tuple[str, tuple[Axis, ...]], ...] = (
    (r"embedding\.(word|position)_embeddings\.weight|output_layer\.weight", ("", "hidden")),
    (r".*layernorm\.(weight|bias)", ("hidden",)),
    (r".*linear_qkv\.weight", ("qkv", "hidden")),
    (r".*linear_qkv\.bias", ("qkv",)),
    (r".*linear_proj\.weight", ("hidden", "heads")),
    (r".*linear_fc1\.weight(_[wv])?", ("ffn", "hidden")),
    (r".*linear_fc1\.bias(_[wv])?", ("ffn",)),
    (r".*linear_fc2\.weight", ("hidden", "ffn")),
    (r".*linear_(proj|fc2)\.bias", ("hidden",)),
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Parts:
    """A global tensor: its Transformer layer, None outside of them, and what each axis is made of ("": something that is never pruned)."""

    layer: int | None
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, name: str) -> Parts:
        axes = next((axes for pattern, axes in _AXES if re.fullmatch(pattern, name)), None)
        assert axes is not None, f"{name} is no tensor of a GPT"
        layer = _LAYER.match(name)
        return cls(int(layer[1]) if layer else None, axes)


def at_layer(name: str, layer: int) -> str:
    """The same tensor's name in another layer."""
    return _LAYER.sub(f"decoder.layers.{layer}.", name, count=1)
