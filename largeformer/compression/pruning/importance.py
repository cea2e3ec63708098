"""How much each part of a model matters: feed-forward channels, heads, hidden channels, layers.

From activations as in Minitron (Muralidharan et al. 2024, arXiv:2407.14679), aggregated by L2 over tokens and samples alike.
Layers by what they change: 1 - cos(input, output) (Men et al. 2024, arXiv:2403.03853), or by the loss without them. All are sums over
samples, so that a result does not depend on the layout.

`l` layers, `f` feed-forward channels, `n` heads, `g` query groups, `d` head size, `h` hidden, `s` sequence, `b` rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from largeformer.compression.pruning.parts import Parts
from largeformer.compression.pruning.sparsity import StoredWeights
from largeformer.config.schema import ModelConfig
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups
from largeformer.parallel.pipeline import evaluate_loss


@dataclass(frozen=True)
class Importance:
    """float64 on the CPU; the larger, the more it matters. ffn: [l, f]; heads: [l, n]; hidden: [h]; layers: [l]. energy: [2 l + 1, h], the
    share of each hidden channel in the variance that a norm divides by: two norms a layer, and the last; None where no text was seen."""

    ffn: torch.Tensor
    heads: torch.Tensor
    hidden: torch.Tensor
    layers: torch.Tensor
    energy: torch.Tensor | None = None

    def table(self) -> dict[str, Any]:
        """As JSON."""
        return {name: getattr(self, name).tolist() for name in ("ffn", "heads", "hidden", "layers")}


class _Sums:
    """What the hooks add up on this rank; channels that tensor parallelism splits are this rank's alone."""

    def __init__(self, layers: int) -> None:
        self.ffn: list[Any] = [0.0] * layers
        self.heads: list[Any] = [0.0] * layers
        self.hidden: list[Any] = [0.0] * (2 * layers)
        self.energy: list[Any] = [0.0] * (2 * layers + 1)
        self.changed: list[Any] = [0.0] * layers
        self.tokens = 0

    def samples(self, into: list[Any], at: int, magnitudes: torch.Tensor) -> None:
        """magnitudes: [s, b, channels], not negative."""
        into[at] = into[at] + magnitudes.double().square().mean(0).sum(0)

    def variance(self, at: int, hidden: torch.Tensor, centred: bool) -> None:
        hidden = hidden.double()
        hidden = hidden - hidden.mean(-1, keepdim=True) if centred else hidden
        squares = hidden.square()
        self.energy[at] = self.energy[at] + (squares / squares.sum(-1, keepdim=True).clamp_min(1e-300)).flatten(0, -2).sum(0)

    def change(self, at: int, before: torch.Tensor, after: torch.Tensor) -> None:
        cosines = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
        self.changed[at] = self.changed[at] + (1 - cosines).sum()


@torch.no_grad()
def from_activations(model: Any, batches: Sequence[Batch], groups: ParallelGroups, shape: ModelConfig) -> Importance:
    """Everything but ablation, in one pass over `batches`. Collective; alike on every rank. `model`: as for `layerwise.walk`."""
    sums = _Sums(shape.num_layers)
    with _watched(model, sums, shape):
        for batch in batches:
            model(batch.tokens, batch.position_ids, batch.attention_mask())
            sums.tokens += batch.tokens.numel()
    tokens = _over_data(torch.tensor([float(sums.tokens)], dtype=torch.float64, device=groups.device), groups)
    return Importance(
        ffn=_over_data(_whole(torch.stack(sums.ffn), groups), groups).sqrt().cpu(),
        heads=_over_data(_whole(torch.stack(sums.heads), groups), groups).sqrt().cpu(),
        hidden=_over_data(torch.stack(sums.hidden), groups).sqrt().sum(0).cpu(),
        layers=(_over_data(torch.stack(sums.changed), groups) / tokens).cpu(),
        energy=(_over_data(torch.stack(sums.energy), groups) / tokens).cpu(),
    )


@contextlib.contextmanager
def _watched(model: Any, sums: _Sums, shape: ModelConfig) -> Iterator[None]:
    centred, handles = shape.normalization == "LayerNorm", list[RemovableHandle]()

    def norm(at: int, scored: bool) -> Any:
        def seen(_: Any, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
            sums.variance(at, arguments[0], centred)
            if scored:
                sums.samples(sums.hidden, at, output.abs())

        return seen

    def watch(index: int, layer: Any) -> None:
        def ffn(_: Any, arguments: tuple[Any, ...]) -> None:
            sums.samples(sums.ffn, index, arguments[0].abs())

        def heads(_: Any, arguments: tuple[Any, ...]) -> None:
            sums.samples(sums.heads, index, arguments[0].float().unflatten(-1, (-1, shape.head_dim)).norm(dim=-1))

        def whole(_: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            sums.change(index, before, output[0] if isinstance(output, tuple) else output)

        handles.extend(
            (
                layer.mlp.linear_fc2.register_forward_pre_hook(ffn),
                layer.self_attention.linear_proj.register_forward_pre_hook(heads),
                layer.input_layernorm.register_forward_hook(norm(2 * index, True)),
                layer.pre_mlp_layernorm.register_forward_hook(norm(2 * index + 1, True)),
                layer.register_forward_hook(whole, with_kwargs=True),
            )
        )

    for index, layer in enumerate(model.decoder.layers):
        watch(index, layer)
    handles.append(model.decoder.final_layernorm.register_forward_hook(norm(2 * shape.num_layers, False)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def from_weights(stored: StoredWeights, shape: ModelConfig) -> Importance:
    """L2 norms of all weights of a channel, head or layer: rows and columns, biases too. On one process; a tensor at a time."""
    layers, d = shape.num_layers, shape.head_dim
    sums = {
        "ffn": torch.zeros(layers, shape.ffn_size, dtype=torch.float64),
        "heads": torch.zeros(layers, shape.num_attention_heads, dtype=torch.float64),
        "hidden": torch.zeros(shape.hidden_size, dtype=torch.float64),
        "layers": torch.zeros(layers, dtype=torch.float64),
    }
    for name in stored.names:
        part = Parts.of(name)
        squares = stored.read(name).double().square()
        for axis, kind in enumerate(part.axes):
            along = squares.sum([other for other in range(squares.dim()) if other != axis]) if squares.dim() > 1 else squares
            if kind == "hidden":
                sums["hidden"] += along
            elif kind == "ffn":
                sums["ffn"][part.layer] += along
            elif kind == "heads":
                sums["heads"][part.layer] += along.view(-1, d).sum(-1)
            elif kind == "qkv":
                per_group = shape.num_attention_heads // shape.query_groups
                queries = along.view(shape.query_groups, per_group + 2, d)[:, :per_group]
                sums["heads"][part.layer] += queries.sum(-1).flatten()
        if part.layer is not None:
            sums["layers"][part.layer] += squares.sum()
    return Importance(**{kind: values.sqrt() for kind, values in sums.items()})


@torch.no_grad()
def by_ablation(model: Any, batches: Sequence[Batch], groups: ParallelGroups, removed: int) -> tuple[torch.Tensor, list[int]]:
    """Remove layer after layer, each time the one without which the loss is least, until `removed` are gone. Collective.

    Returns: [l], the rise of the mean loss in nats without the layer, as it was last measured; and the removed layers in their order.
    """
    layers = list(model.decoder.layers)
    counted = sum(float(batch.loss_mask.sum()) for batch in batches)
    tokens = _over_data(torch.tensor([counted], dtype=torch.float64, device=groups.device), groups)

    def loss_without(gone: Sequence[int]) -> float:
        with _only(model, [layer for index, layer in enumerate(layers) if index not in gone]):
            total = evaluate_loss([model], batches, groups).double()
        return float(_over_data(total.to(groups.device).view(1), groups) / tokens)

    rise, gone = torch.full((len(layers),), torch.nan, dtype=torch.float64), list[int]()
    base = loss_without([])
    for _ in range(removed):
        for index in (index for index in range(len(layers)) if index not in gone):
            rise[index] = loss_without([*gone, index]) - base
        least = min((index for index in range(len(layers)) if index not in gone), key=lambda index: float(rise[index]))
        gone.append(least)
    return rise, gone


@contextlib.contextmanager
def _only(model: Any, layers: Sequence[torch.nn.Module]) -> Iterator[None]:
    whole = model.decoder.layers
    model.decoder.layers = torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        model.decoder.layers = whole


def _whole(part: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """[l, channels] from the tensor-parallel ranks' [l, channels / t]."""
    if groups.layout.tensor == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(groups.layout.tensor)]
    dist.all_gather(parts, part.contiguous(), group=groups.tensor)
    return torch.cat(parts, dim=1)


def _over_data(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    dist.all_reduce(values, group=groups.data)
    return values
