"""Seconds of a whole step: the pipeline's schedule, what data parallelism exchanges, and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.schema import Recipe
from largeformer.layout import Layout
from largeformer.models.flops import flops_per_token
from largeformer.planning.activations import boundary_bytes
from largeformer.planning.cost import ModelCost, Seconds
from largeformer.planning.efficiency import Speed
from largeformer.planning.hardware import Cluster
from largeformer.planning.inventory import Inventory
from largeformer.planning.simulate import Timeline, simulate

_STEP_BYTES = 34  # of an element in the optimizer's step: gradient, norm, master, two moments, the new weight
_HOST_GB_S = 20.0  # memory bandwidth of the host, a GPU's share
_HIDDEN_SHARE = 0.9  # of a backward, that overlapped communication can hide behind


@dataclass(frozen=True)
class StepTime:
    """seconds of a step, and the parts that add up to it. work_s: the busiest stage's, without communication; tensor_s: its
    tensor-parallel communication; bubble_s: what it waits for others; data_s: gradients and weights between data-parallel ranks,
    as far as they are not hidden; optimizer_s: the update, with offload's traffic. bubble: waiting relative to work, simulated."""

    seconds: float
    work_s: float
    tensor_s: float
    bubble_s: float
    data_s: float
    optimizer_s: float
    bubble: float
    mfu: float
    tokens_per_s: float


@dataclass(frozen=True)
class Job:
    """What is timed: a recipe at a layout, under a DeepSpeed config (resolved, or its ZeRO section), on a cluster."""

    recipe: Recipe
    layout: Layout
    deepspeed: Mapping[str, Any]
    cluster: Cluster
    stages: Sequence[Inventory]

    @property
    def microbatches(self) -> int:
        return self.recipe.train.global_batch_size // (self.recipe.train.micro_batch_size * self.layout.data)


def step_time(job: Job, exact: bool = True) -> StepTime:
    """`exact` simulates the schedule; without, the bubble is estimated from its formula, for a search through many layouts."""
    speed = Speed(job.cluster, job.recipe.train.precision)
    costs = _chunk_costs(job, ModelCost(job.recipe, speed))
    timeline = _timeline(job, speed, costs, exact)
    busiest = max(range(len(costs)), key=lambda stage: timeline.busy[stage])
    tensor = job.microbatches * sum(cost.forward_link + cost.backward_link for cost in costs[busiest])
    work = timeline.busy[busiest] - tensor
    data = max(_data_seconds(job, speed, stage, timeline.busy[stage.stage]) for stage in job.stages)
    optimizer = max(_optimizer_seconds(job, speed, stage) for stage in job.stages)
    seconds = timeline.seconds + data + optimizer
    tokens = job.recipe.train.global_batch_size * job.recipe.model.seq_length
    flops = flops_per_token(job.recipe.model, job.recipe.tokenizer.vocab_size) * tokens
    peak = job.cluster.peak_flops(job.recipe.train.precision) * job.layout.world_size
    return StepTime(
        seconds=seconds,
        work_s=work,
        tensor_s=tensor,
        bubble_s=timeline.seconds - timeline.busy[busiest],
        data_s=data,
        optimizer_s=optimizer,
        bubble=timeline.bubble,
        mfu=flops / (seconds * peak),
        tokens_per_s=tokens / seconds,
    )


def _chunk_costs(job: Job, model: ModelCost) -> list[list[Seconds]]:
    """By stage and chunk."""
    return [
        [
            model.chunk(layers, stage.has_embedding and number == 0, stage.has_head and number == len(stage.chunks) - 1)
            for number, layers in enumerate(stage.chunks)
        ]
        for stage in job.stages
    ]


def _timeline(job: Job, speed: Speed, costs: list[list[Seconds]], exact: bool) -> Timeline:
    forward = [[cost.forward + cost.forward_link for cost in chunks] for chunks in costs]
    backward = [[cost.backward + cost.backward_link for cost in chunks] for chunks in costs]
    pipeline, stride = job.layout.pipeline, job.layout.tensor * job.layout.data
    transfer = speed.send(boundary_bytes(job.recipe), stride) if pipeline > 1 else 0.0
    if exact and pipeline > 1:
        return simulate(forward, backward, job.microbatches, transfer)
    one_batch = [sum(there) + sum(back) for there, back in zip(forward, backward, strict=True)]
    busy = tuple(job.microbatches * seconds for seconds in one_batch)
    # Before and after the busiest stage's work, one micro batch passes through a chunk of every other stage.
    filling = (sum(one_batch) - max(one_batch)) / job.layout.virtual + 2 * (pipeline - 1) * transfer
    return Timeline(max(busy) + filling, busy, busy)


def _data_seconds(job: Job, speed: Speed, stage: Inventory, busy: float) -> float:
    """What the exchange between data-parallel ranks adds to the step."""
    zero, data, stride = ZeroConfig.of(job.deepspeed), job.layout.data, job.layout.tensor
    width = 4 if job.recipe.train.precision == "fp32" else 2  # gradients are sent in the model's type, wherever they are summed
    elements = stage.elements
    weights = speed.all_gather(width * elements, data, stride)
    if zero.stage == 0:
        exchanged, after = speed.all_reduce(4 * elements, data, stride), 0.0
    elif zero.stage == 1:
        exchanged, after = speed.all_reduce(width * elements, data, stride), weights
    elif zero.stage == 2:
        exchanged, after = job.microbatches * speed.all_reduce(width * elements, data, stride), weights
    else:
        exchanged = job.microbatches * (2 * weights + speed.all_gather(width * elements, data, stride))
        after = 0.0
        if zero.offload_param != "none":
            bandwidth = job.cluster.pcie_gb_s if zero.offload_param == "cpu" else job.cluster.nvme_gb_s
            exchanged += job.microbatches * 2 * width * elements / data / (bandwidth * 1e9)
    if not zero.overlap_comm:
        return exchanged + after
    hidden = busy if zero.stage >= 2 else busy / job.microbatches
    return max(exchanged - _HIDDEN_SHARE * hidden, (1 - _HIDDEN_SHARE) * exchanged) + after


def _optimizer_seconds(job: Job, speed: Speed, stage: Inventory) -> float:
    zero = ZeroConfig.of(job.deepspeed)
    elements = stage.elements / (job.layout.data if zero.stage > 0 else 1)
    if zero.offload_optimizer == "none":
        return speed.memory(_STEP_BYTES * elements)
    copied = 6 * elements / (job.cluster.pcie_gb_s * 1e9)  # gradients there, weights back
    updated = _STEP_BYTES * elements / (_HOST_GB_S * 1e9)
    swapped = 24 * elements / (job.cluster.nvme_gb_s * 1e9) if zero.offload_optimizer == "nvme" else 0.0
    return copied + updated + swapped
