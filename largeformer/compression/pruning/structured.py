"""A smaller model out of a larger one: which channels, heads and layers stay, and the weights that are left.

What stays keeps its order. Channels and heads are chosen in each layer by itself; hidden channels, which all layers share, once.
Weights are cut from the parent's global tensors one at a time, so that the result does not depend on any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from largeformer.compression.pruning.importance import Importance
from largeformer.compression.pruning.parts import Parts, at_layer
from largeformer.compression.pruning.sparsity import StoredWeights
from largeformer.config.schema import ModelConfig


@dataclass(frozen=True)
class Kept:
    """Indices into the parent. layers, hidden: ascending. ffn, heads, groups: of each of the parent's layers, ascending."""

    layers: list[int]
    hidden: list[int]
    ffn: list[list[int]]
    heads: list[list[int]]
    groups: list[list[int]]

    def table(self) -> dict[str, Any]:
        """As JSON, of the layers that stay."""
        per_layer = {name: [getattr(self, name)[layer] for layer in self.layers] for name in ("ffn", "heads", "groups")}
        return {"layers": self.layers, "hidden": self.hidden, **per_layer}


def choose(importance: Importance, before: ModelConfig, after: ModelConfig, gone: list[int] | None = None) -> Kept:
    """What stays of `before` in the shape `after`: the most important. `gone`: the layers that do not, where they are settled already."""
    layers = range(before.num_layers)
    kept = [layer for layer in layers if layer not in gone] if gone is not None else _largest(importance.layers, after.num_layers)
    pairs = [_heads(importance.heads[layer], before, after) for layer in layers]
    return Kept(
        layers=kept,
        hidden=_largest(importance.hidden, after.hidden_size),
        ffn=[_largest(importance.ffn[layer], after.ffn_size) for layer in layers],
        heads=[heads for heads, _ in pairs],
        groups=[groups for _, groups in pairs],
    )


def _largest(scores: torch.Tensor, count: int) -> list[int]:
    """The indices of the `count` largest, ascending; of equal ones the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


def _heads(scores: torch.Tensor, before: ModelConfig, after: ModelConfig) -> tuple[list[int], list[int]]:
    """Of each query group that stays equally many heads. A group counts as much as the heads that it would keep."""
    per_group = before.num_attention_heads // before.query_groups
    stay = after.num_attention_heads // after.query_groups
    of_groups = scores.view(before.query_groups, per_group)
    groups = _largest(of_groups.topk(stay, dim=1).values.sum(1), after.query_groups)
    return [group * per_group + head for group in groups for head in _largest(of_groups[group], stay)], groups


def cut(
    stored: StoredWeights, kept: Kept, importance: Importance, changed: Mapping[str, torch.Tensor], before: ModelConfig, name: str
) -> torch.Tensor:
    """The tensor `name` of the smaller model, in the stored dtype. changed: whole tensors, by the parent's names, to be cut instead."""
    layer, source = _source(name, kept)
    tensor = changed[source].to(stored.dtype(source)) if source in changed else stored.read(source)
    for axis, kind in enumerate(Parts.of(name).axes):
        if kind:
            tensor = tensor.index_select(axis, _indices(kind, kept, layer, before))
    if name.endswith("layernorm.weight"):
        tensor = (tensor.float() * _norm_factor(name, layer, kept, importance, before)).to(tensor.dtype)
    return tensor.contiguous()


def cut_shape(stored: StoredWeights, kept: Kept, before: ModelConfig, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """What `cut` will return, without reading it."""
    layer, source = _source(name, kept)
    sizes = zip(stored.shape(source), Parts.of(name).axes, strict=True)
    return tuple(len(_indices(kind, kept, layer, before)) if kind else size for size, kind in sizes), stored.dtype(source)


def _source(name: str, kept: Kept) -> tuple[int | None, str]:
    """The parent's layer and tensor that the tensor `name` of the smaller model is cut from."""
    layer = Parts.of(name).layer
    return (None, name) if layer is None else (kept.layers[layer], at_layer(name, kept.layers[layer]))


def new_names(stored: StoredWeights, kept: Kept) -> Iterator[str]:
    """The smaller model's tensors."""
    place = {layer: index for index, layer in enumerate(kept.layers)}
    for name in stored.names:
        layer = Parts.of(name).layer
        if layer is None:
            yield name
        elif layer in place:
            yield at_layer(name, place[layer])


def staying(kept: Kept, before: ModelConfig, name: str) -> torch.Tensor:
    """Which input channels of the parent's linear weight `name` stay, ascending."""
    part = Parts.of(name)
    return _indices(part.axes[1], kept, part.layer, before)


def sources(names: Iterable[str], kept: Kept) -> set[str]:
    """The parent's tensors that these of the smaller model are cut from."""
    return {_source(name, kept)[1] for name in names}


def _indices(kind: str, kept: Kept, layer: int | None, before: ModelConfig) -> torch.Tensor:
    if kind == "hidden":
        return torch.tensor(kept.hidden)
    assert layer is not None, "channels and heads stand in layers"
    if kind == "ffn":
        return torch.tensor(kept.ffn[layer])
    d, per_group = before.head_dim, before.num_attention_heads // before.query_groups
    if kind == "heads":
        return _blocks(kept.heads[layer], d)
    blocks = []  # of d rows: each group's queries, then its key, then its value
    for group in kept.groups[layer]:
        first = group * (per_group + 2)
        blocks += [first + head % per_group for head in kept.heads[layer] if head // per_group == group]
        blocks += [first + per_group, first + per_group + 1]
    return _blocks(blocks, d)


def _blocks(numbers: list[int], size: int) -> torch.Tensor:
    return (torch.tensor(numbers)[:, None] * size + torch.arange(size)).flatten()


def _norm_factor(name: str, layer: int | None, kept: Kept, importance: Importance, before: ModelConfig) -> float:
    """What a norm's weight is multiplied by, so that what stays is as large behind the norm as it was: a norm divides by the root of the
    mean over its channels, and that mean changes with them. 1 where no text was seen, from which the channels' shares are known."""
    if importance.energy is None or len(kept.hidden) == before.hidden_size:
        return 1.0
    row = 2 * before.num_layers if layer is None else 2 * layer + ("pre_mlp" in name)
    share = float(importance.energy[row, kept.hidden].sum() / importance.energy[row].sum())
    return math.sqrt(share * before.hidden_size / len(kept.hidden))
