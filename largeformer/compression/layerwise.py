"""One Transformer layer after another over calibration text: see what goes into its linear layers, change them, pass the text on.

Each layer's input is what the layers before it give after they were changed, as in SparseGPT (Frantar and Alistarh 2023,
arXiv:2301.00774) and GPTQ (Frantar et al. 2022, arXiv:2210.17323). One layer's statistics are in memory at a time, and the hidden
states of all calibration text. `n` tokens, `i` input channels, `s` sequence, `b` rows, `h` hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.hooks import RemovableHandle

from largeformer.compression.linears import Linear, linears
from largeformer.models.shards import Shard
from largeformer.parallel.batch import Batch
from largeformer.parallel.groups import ParallelGroups


class Statistic(Protocol):
    """What is learnt of one linear layer's inputs."""

    def update(self, inputs: torch.Tensor) -> None:
        """inputs: [n, i], whole, of one batch of this data rank."""

    def reduce(self, groups: ParallelGroups) -> None:
        """Add up the data ranks' parts, once all batches were seen. Collective over data parallelism."""


S = TypeVar("S", bound=Statistic)


@torch.no_grad()
def walk(
    model: Any,
    shards: Sequence[Shard],
    batches: Sequence[Batch],
    groups: ParallelGroups,
    observe: Callable[[Linear], S],
    change: Callable[[int, Mapping[Linear, S]], None],
) -> None:
    """Call `change(layer, statistics)` for each layer in turn, with what `observe` made and all `batches` went through. Collective.

    model: one chunk without pipeline stages or sequence parallelism, in eval mode, on the batches' device. Within a layer the inputs of
    all linear layers are those from before any of them is changed.
    """
    hidden, calls = _inputs_of_layers(model, batches)
    for index, (layer, own) in enumerate(zip(model.decoder.layers, linears(model, shards, groups), strict=True)):
        statistics = {linear: observe(linear) for linear in own}
        with watching(statistics):
            for states, call in zip(hidden, calls, strict=True):
                _through(layer, states, call)
        for statistic in statistics.values():
            statistic.reduce(groups)
        change(index, statistics)
        hidden = [_through(layer, states, call) for states, call in zip(hidden, calls, strict=True)]


@contextlib.contextmanager
def watching(statistics: Mapping[Linear, Statistic]) -> Iterator[None]:
    """While the block runs, each linear layer's whole inputs go to its statistic."""

    def hook(linear: Linear, statistic: Statistic) -> RemovableHandle:
        def seen(_: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            statistic.update(linear.whole_input(arguments[0].detach().flatten(0, -2)))

        return linear.module.register_forward_pre_hook(seen)

    handles = [hook(linear, statistic) for linear, statistic in statistics.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Caught(Exception):
    """The first layer was reached: the rest of the model need not compute."""


def _inputs_of_layers(model: Any, batches: Sequence[Batch]) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """What the first layer is called with for each batch: hidden states [s, b, h], and the other arguments, which all layers share."""
    hidden: list[torch.Tensor] = []
    calls: list[dict[str, Any]] = []

    def catch(_: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        hidden.append(arguments[0] if arguments else keywords.pop("hidden_states"))
        calls.append(keywords)
        raise _Caught

    handle = model.decoder.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(_Caught):
                model(batch.tokens, batch.position_ids, batch.attention_mask())
    finally:
        handle.remove()
    return hidden, calls


def _through(layer: torch.nn.Module, hidden: torch.Tensor, call: Mapping[str, Any]) -> torch.Tensor:
    output = layer(hidden_states=hidden, **call)
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
