"""Bytes of model state on one rank as DeepSpeed 0.19 lays them out: weights, gradients, float32 masters, the optimizer's moments.

ZeRO's table (Rajbhandari et al. 2020, arXiv:1910.02054, section 5) made exact: DeepSpeed flattens each parameter group and pads it
to twice the data-parallel degree (ZeRO 1 and 2), or pads every parameter alone (ZeRO 3), where small parameters stay whole besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.deepspeed_rules import lookup
from largeformer.config.schema import OptimizerConfig, Recipe
from largeformer.planning.inventory import Inventory

FULL = 4  # bytes of a float32
_ALIGNMENT = 2  # DeepSpeed's `nccl_start_alignment_factor`
_MAX_LIVE = 1_000_000_000  # elements, DeepSpeed's default of stage3_max_live_parameters
_LARGEST_BUCKET = 500_000_000  # elements, DeepSpeed's default


@dataclass(frozen=True)
class State:
    """Bytes after a backward and before its step. gradient_extra: held beside `gradients` while micro batches accumulate.
    buffers: communication buckets, and under ZeRO 3 the weights that are gathered at a time. reducing: what the reduction makes at
    the end of a step."""

    weights: int
    gradients: int
    masters: int
    moments: int
    gradient_extra: int = 0
    buffers: int = 0
    reducing: int = 0


@dataclass(frozen=True)
class Placed:
    """The same state by where it lives."""

    device: State
    host: int = 0
    nvme: int = 0


def state_of(recipe: Recipe, inventory: Inventory, deepspeed: Mapping[str, Any], data: int) -> Placed:
    """`deepspeed`: resolved, or only its ZeRO section; `data`: data-parallel degree."""
    zero = ZeroConfig.of(deepspeed)
    state = _state(recipe, inventory, zero, deepspeed, data)
    return _offloaded(recipe, inventory, zero, state)


def _state(recipe: Recipe, inventory: Inventory, zero: ZeroConfig, deepspeed: Mapping[str, Any], data: int) -> State:
    width = FULL if recipe.train.precision == "fp32" else 2
    moments = moment_bytes(recipe.optimizer)
    if zero.stage == 0:
        elements = inventory.elements
        return State(width * elements, FULL * elements, 0, moments * elements)
    if zero.stage == 3:
        return _stage3(inventory, deepspeed, data, width, moments)
    flat = sum(_padded(group, data) for group in inventory.groups)
    part = flat // data
    bucket = min(lookup(deepspeed, "zero_optimization.reduce_bucket_size") or _LARGEST_BUCKET, _LARGEST_BUCKET)
    if zero.stage == 1 and recipe.train.precision == "bf16" and zero.offload_optimizer == "none":
        # DeepSpeed's BF16_Optimizer: float32 gradients of everything, reduced whole and in place.
        return State(width * flat, FULL * flat, FULL * part, moments * part, reducing=width * flat if data > 1 else 0)
    summed = accumulation_bytes(recipe)
    gradients = summed * part
    extra = 0 if zero.stage == 2 else summed * inventory.elements - gradients
    return State(width * flat, gradients, FULL * part, moments * part, max(extra, 0), width * bucket)


def _stage3(inventory: Inventory, deepspeed: Mapping[str, Any], data: int, width: int, moments: int) -> State:
    threshold = lookup(deepspeed, "zero_optimization.stage3_param_persistence_threshold") or 0
    bucket = min(lookup(deepspeed, "zero_optimization.reduce_bucket_size") or _LARGEST_BUCKET, _LARGEST_BUCKET)
    most_live = lookup(deepspeed, "zero_optimization.stage3_max_live_parameters") or _MAX_LIVE
    part, whole = 0, 0
    for group in inventory.groups:
        for size, count in group.items():
            own = -(-size // data)
            part += count * own
            whole += count * own * data if size <= threshold and data > 1 else 0  # alone, a rank's part is the whole
    live = min(inventory.elements - whole, max(most_live, inventory.largest)) if data > 1 else 0
    return State(width * (part + whole), FULL * part, FULL * part, moments * part, 0, width * (live + bucket))


def _offloaded(recipe: Recipe, inventory: Inventory, zero: ZeroConfig, state: State) -> Placed:
    """Masters and moments, and with them the partitioned gradients, go to the host or NVMe; under ZeRO 3 the weights may too."""
    host = nvme = 0
    weights, gradients, masters, moments, buffers = state.weights, state.gradients, state.masters, state.moments, state.buffers
    width = FULL if recipe.train.precision == "fp32" else 2
    if zero.offload_optimizer != "none":
        if zero.offload_optimizer == "cpu":
            host += masters + moments
        else:
            nvme += masters + moments
            host += 2 * FULL * inventory.largest  # what is read and written at a time
        # Gradients wait on the host; ZeRO 1 and 2 keep the new weights there too, until they are copied.
        host += gradients + (width * masters // FULL if zero.stage < 3 else 0)
        buffers += width * inventory.largest
        gradients = masters = moments = 0
    if zero.offload_param != "none":
        if zero.offload_param == "cpu":
            host += weights
        else:
            nvme += weights
        weights = 0
    return Placed(State(weights, gradients, masters, moments, state.gradient_extra, buffers, state.reducing), host, nvme)


def moment_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes of the optimizer's state for each master: two moments of Adam, one of SGD with momentum."""
    if optimizer.type != "sgd":
        return 2 * FULL
    return FULL if optimizer.momentum > 0 else 0


def accumulation_bytes(recipe: Recipe) -> int:
    """Bytes that a gradient is summed in over micro batches; `config.deepspeed` decides so."""
    pipelined = recipe.parallel.pipeline_model_parallel_size > 1
    return 2 if recipe.train.precision == "fp16" and pipelined else FULL


def _padded(group: Counter[int], data: int) -> int:
    grain = _ALIGNMENT * data
    return -(-sum(size * count for size, count in group.items()) // grain) * grain
