"""Parallel linear layers that compute with what integers stand for, in evaluation and in quantization-aware training.

Gradients pass straight through the rounding (Bengio et al. 2013, arXiv:1308.3432); where static activations are cut off, none passes.
The stand-in sits where Megatron-core multiplies, inside the layer's own forward: there ZeRO 3 has gathered the weight, sequence
parallelism not yet the tokens, and recomputation passes by again. `o` output, `i` this rank's input channels, `t` tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import RowParallelLinear

from largeformer.compression.quantization.schemes import Given, Scheme, rounded, rounded_inputs, scale_of
from largeformer.errors import BadInputError
from largeformer.models.shards import Shard
from largeformer.parallel.groups import ParallelGroups

_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def round_in(
    module: Any,
    groups: ParallelGroups,
    split_input: bool,
    *,
    activations: bool = True,
    static: torch.Tensor | None = None,
    weights: Scheme | None = None,
) -> Callable[[], None]:
    """From now on `module` multiplies rounded inputs, where `activations`, by rounded weights, where `weights`. Returns: what undoes it.

    static: the scale of the inputs, else each token has its own. split_input: ranks have parts of the input channels, and agree on scales.
    Raises BadInputError where a group of input channels would lie on two ranks.
    """
    group = groups.tensor if split_input and groups.layout.tensor > 1 else None
    multiply = module._forward_impl

    def largest(found: torch.Tensor) -> torch.Tensor:
        if group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return found

    def rounding(input: torch.Tensor, weight: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:  # the library's names
        if activations:
            input = _straight_through(input, rounded_inputs(input.detach(), static, largest), _within(input, static))
        if weights is not None:
            given = _scales(weight.detach(), weights, largest)
            weight = _straight_through(weight, rounded(weight.detach(), given, weights).to(weight.dtype))
        return multiply(input, weight, *arguments, **keywords)

    module._forward_impl = rounding

    def undo() -> None:
        del module._forward_impl

    return undo


def train_rounded(
    chunks: Sequence[Any],
    shards: Sequence[Shard],
    groups: ParallelGroups,
    scheme: Scheme,
    input_scales: Mapping[str, torch.Tensor],
    kept: frozenset[str],
) -> None:
    """Let every linear layer of this rank's chunks train as `scheme` will round it, but those in `kept`. Before the engine takes them.

    input_scales: of static activations, by our global names such as `decoder.layers.3.mlp.linear_fc1`.
    """
    names = {id(shard.parameter): shard.key.rpartition(".")[0] for shard in shards}
    for chunk in chunks:
        for path, module in chunk.named_modules():
            if not path.endswith(_LINEAR) or (name := names[id(module.weight)]) in kept:
                continue
            split = isinstance(module, RowParallelLinear)
            inputs = module.weight.shape[1]
            if scheme.group_size and inputs % scheme.group_size:
                raise BadInputError(
                    f"quantize.group_size {scheme.group_size} does not divide {inputs}, the inputs of {name} on one of "
                    f"{groups.layout.tensor} tensor-parallel ranks, which qat needs: choose a divisor, or fewer of them"
                )
            static = input_scales[name].to(module.weight.device) if scheme.activations == "tensor" else None
            round_in(module, groups, split, activations=scheme.activations is not None, static=static, weights=scheme)


def _straight_through(exact: torch.Tensor, made: torch.Tensor, passing: torch.Tensor | None = None) -> torch.Tensor:
    """`made`, with the gradient of `exact`, where `passing`."""
    if not torch.is_grad_enabled() or not exact.requires_grad:
        return made
    if passing is not None:
        exact = exact * passing
    return exact + (made - exact).detach()


def _within(inputs: torch.Tensor, static: torch.Tensor | None) -> torch.Tensor | None:
    return None if static is None else inputs.detach().abs() <= (static * 127.5).to(inputs.dtype)


def _scales(weight: torch.Tensor, scheme: Scheme, largest: Callable[[torch.Tensor], torch.Tensor]) -> Given:
    """From the extremes of each channel over all ranks, or of each group of input channels, which lies on one rank."""
    low, high = weight.float().unflatten(1, (-1, scheme.group_size or weight.shape[1])).aminmax(dim=2)
    if scheme.group_size is None:
        low, high = largest(torch.stack([-low, high])).unbind()
        low = -low
    return scale_of(low, high, scheme, weight.dtype)
