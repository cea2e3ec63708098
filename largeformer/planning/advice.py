"""What an engineer would try next: from one device over data parallelism and ZeRO to tensor and pipeline parallelism."""

from __future__ import annotations

from collections.abc import Iterator

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.size import model_parameters
from largeformer.planning.hardware import GIB
from largeformer.planning.prediction import Prediction
from largeformer.planning.states import moment_bytes


def advice(prediction: Prediction) -> list[str]:
    """Sentences on this layout, most useful first."""
    return [scale(prediction), *_memory(prediction), *_speed(prediction)]


def scale(prediction: Prediction) -> str:
    """Which kind of parallelism the model's size asks for on this machine."""
    job = prediction.job
    width = 4 if job.recipe.train.precision == "fp32" else 2
    parameters = model_parameters(job.recipe.model, job.recipe.padded_vocab_size)
    whole = parameters * (width + 4 + (4 if width == 2 else 0) + moment_bytes(job.recipe.optimizer)) / GIB
    have, world = job.cluster.gpu.memory_gib, job.layout.world_size
    size = f"weights, gradients and optimizer state of {parameters / 1e9:.3g}B parameters take {whole:,.1f} GiB"
    if whole < 0.7 * have:
        more = "data parallelism with ZeRO 1 is all that more devices need" if world > 1 else "no parallelism is needed"
        return f"Small scale: {size}, and one {job.cluster.gpu.name} holds them: {more}."
    if whole < 0.7 * have * min(world, job.cluster.gpus_per_node):
        return (
            f"Medium scale: {size}, which a node holds and one device does not: ZeRO 2 or 3 divides them, or tensor parallelism "
            "within the node, with sequence parallelism."
        )
    if whole < 0.7 * have * world:
        return (
            f"Large scale: {size}, more than a node has: tensor parallelism within nodes and pipeline stages across them, with ZeRO 1; or "
            "ZeRO 3 where the network is fast."
        )
    return f"Too large: {size}, and {world} x {have:g} GiB hold no more than that: add devices, or offload to the host (zero3_offload_cpu)."


def _memory(prediction: Prediction) -> Iterator[str]:
    job, row = prediction.job, prediction.fullest
    zero, train = ZeroConfig.of(job.deepspeed), job.recipe.train
    have = job.cluster.gpu.memory_gib * GIB
    if row.total_bytes <= have:
        if row.total_bytes < 0.5 * have and train.recompute_granularity is not None:
            yield "Half of the memory stays free: recompute less (train.recompute_granularity=null), which saves time."
        return
    if row.start_bytes == row.total_bytes:
        yield (
            "The weights do not fit one device before ZeRO 3 has parted them, since each rank builds its whole part first: raise "
            f"parallel.tensor_model_parallel_size, up to the node's {job.cluster.gpus_per_node}."
        )
        return
    if row.activation_bytes > 0.3 * row.total_bytes:
        if train.micro_batch_size > 1:
            yield f"Activations fill most: lower train.micro_batch_size from {train.micro_batch_size}."
        if train.recompute_granularity != "full":
            yield "Activations fill most: train.recompute_granularity=full keeps only each layer's input, for a third more compute."
        if job.layout.tensor > 1 and not job.layout.sequence_parallel:
            yield "parallel.sequence_parallel=true divides what tensor parallelism leaves whole, at no cost."
    if row.state_bytes > 0.5 * row.total_bytes:
        if job.layout.pipeline == 1 and zero.stage < 3 and job.layout.data > 1:
            yield f"Model state fills most: deepspeed=zero{zero.stage + 1} divides more of it by {job.layout.data}."
        if job.layout.tensor < job.cluster.gpus_per_node:
            yield f"Model state fills most: raise parallel.tensor_model_parallel_size, up to the node's {job.cluster.gpus_per_node}."
        if job.layout.pipeline > 1 or zero.stage == 3:
            yield "Model state fills most: more pipeline stages, or deepspeed=zero3_offload_cpu without a pipeline."


def _speed(prediction: Prediction) -> Iterator[str]:
    job, step = prediction.job, prediction.step
    zero = ZeroConfig.of(job.deepspeed)
    if step.bubble_s > 0.1 * step.seconds:
        yield (
            f"The pipeline waits {step.bubble_s / step.seconds:.0%} of a step: more micro batches a step (now {job.microbatches}), fewer "
            "stages, or virtual stages (parallel.virtual_pipeline_model_parallel_size)."
        )
    if step.tensor_s > 0.25 * step.seconds:
        where = "across nodes" if job.layout.tensor > job.cluster.gpus_per_node else "within the node"
        yield f"Tensor parallelism spends {step.tensor_s / step.seconds:.0%} of a step on communication {where}: lower its degree."
    if step.data_s > 0.15 * step.seconds:
        overlap = "" if zero.overlap_comm else "; zero_optimization.overlap_comm true hides a part of it"
        fewer = " ZeRO 2 and 3 exchange in every micro batch: raise train.micro_batch_size." if zero.stage >= 2 else ""
        yield f"Data-parallel ranks spend {step.data_s / step.seconds:.0%} of a step on exchange{overlap}.{fewer}"
