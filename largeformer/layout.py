"""Degrees of parallelism, rank arithmetic and every divisibility rule. Plain integers: no torch, no process groups.

Ranks are laid out tensor-fastest, then data, then pipeline (Megatron's order "tp-dp-pp"): neighbours share a tensor group.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands along each axis."""

    tensor: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class Layout:
    """How a world of ranks is cut. Raises ValueError, with the arithmetic, where the degrees do not divide it."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.world_size % self.model_size:
            raise ValueError(
                f"world size {self.world_size} does not fit: parallel.tensor_model_parallel_size {self.tensor} x "
                f"parallel.pipeline_model_parallel_size {self.pipeline} = {self.model_size} must divide it; "
                f"start a multiple of {self.model_size} ranks"
            )

    @property
    def model_size(self) -> int:
        """Ranks that together hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def data(self) -> int:
        """Copies of the model: the data-parallel degree."""
        return self.world_size // self.model_size

    def coordinates(self, rank: int) -> Coordinates:
        return Coordinates(
            tensor=rank % self.tensor,
            data=rank // self.tensor % self.data,
            pipeline=rank // (self.tensor * self.data),
        )


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor: int) -> int:
    """`vocab_size` rounded up to a multiple of `divisible_by * tensor`, as Megatron pads it."""
    multiple = divisible_by * tensor
    return -(-vocab_size // multiple) * multiple


def stage_layers(num_layers: int, pipeline: int, virtual: int = 1, first: int | None = None, last: int | None = None) -> list[list[range]]:
    """Which layers each pipeline stage holds, as `[stage][virtual chunk] -> range of layer numbers`.

    Interleaved schedules give stage i the chunks i, i + p, i + 2p, ... (Narayanan et al. 2021, arXiv:2104.04473, 2.2).
    `first` and `last` fix the number of layers in the first and last stage; the rest share what remains.
    """
    chunks: list[list[range]] = [[] for _ in range(pipeline)]
    per_stage = _layers_per_stage(num_layers, pipeline, first, last)
    if virtual == 1:
        starts = [sum(per_stage[:i]) for i in range(pipeline)]
        return [[range(start, start + count)] for start, count in zip(starts, per_stage, strict=True)]
    start = 0
    for _ in range(virtual):
        for stage in range(pipeline):
            count = per_stage[stage] // virtual
            chunks[stage].append(range(start, start + count))
            start += count
    return chunks


def _layers_per_stage(num_layers: int, pipeline: int, first: int | None, last: int | None) -> list[int]:
    middle = pipeline - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    share = rest // middle if middle else 0
    return [*([first] if first is not None else []), *[share] * middle, *([last] if last is not None else [])]


def batch_problems(global_batch: int, micro_batch: int, layout: Layout) -> list[str]:
    """What is wrong with the batch arithmetic of `layout`; empty where nothing is."""
    divisor = micro_batch * layout.data
    if global_batch % divisor:
        return [
            f"train.global_batch_size {global_batch} is not a multiple of train.micro_batch_size {micro_batch} x data parallel "
            f"{layout.data} = {divisor}; the nearest that fits is {max(divisor, round(global_batch / divisor) * divisor)}"
        ]
    microbatches = global_batch // divisor
    if layout.virtual > 1 and microbatches % layout.pipeline:
        return [
            f"train.global_batch_size {global_batch} gives {microbatches} microbatches a rank; the interleaved schedule needs a multiple "
            f"of parallel.pipeline_model_parallel_size {layout.pipeline}, such as a batch of "
            f"{-(-microbatches // layout.pipeline) * layout.pipeline * divisor}"
        ]
    return []


def shape_problems(
    *,
    num_layers: int,
    heads: int,
    query_groups: int,
    ffn: int,
    seq_length: int,
    tensor: int,
    pipeline: int,
    virtual: int,
    sequence_parallel: bool,
    first: int | None = None,
    last: int | None = None,
) -> list[str]:
    """Every rule that the model's shape must obey at these degrees; one sentence each, empty where all hold."""
    problems = []
    for name, value in (("num_attention_heads", heads), ("num_query_groups", query_groups), ("ffn_hidden_size", ffn)):
        if value % tensor:
            problems.append(
                f"model.{name} {value} is not divisible by parallel.tensor_model_parallel_size {tensor}; "
                f"the nearest degree that divides it is {_nearest_divisor(value, tensor)}"
            )
    if heads % query_groups:
        problems.append(
            f"model.num_attention_heads {heads} is not divisible by model.num_query_groups {query_groups}; "
            f"the nearest number of groups that divides it is {_nearest_divisor(heads, query_groups)}"
        )
    if sequence_parallel and tensor == 1:
        problems.append("parallel.sequence_parallel needs parallel.tensor_model_parallel_size > 1; it is 1: set sequence_parallel to false")
    if sequence_parallel and seq_length % tensor:
        problems.append(
            f"model.seq_length {seq_length} is not divisible by parallel.tensor_model_parallel_size {tensor}, as "
            f"parallel.sequence_parallel needs; the next that is: {-(-seq_length // tensor) * tensor}"
        )
    return problems + _pipeline_problems(num_layers, pipeline, virtual, first, last)


def _pipeline_problems(num_layers: int, pipeline: int, virtual: int, first: int | None, last: int | None) -> list[str]:
    problems = []
    degree = f"parallel.pipeline_model_parallel_size {pipeline}"
    uneven = [
        f"parallel.num_layers_in_{which}_pipeline_stage {count}" for which, count in (("first", first), ("last", last)) if count is not None
    ]
    if virtual > 1 and pipeline == 1:
        problems.append(f"parallel.virtual_pipeline_model_parallel_size {virtual} needs more than {degree}; set it to null")
    if virtual > 1 and uneven:
        problems.append(f"parallel.virtual_pipeline_model_parallel_size {virtual} excludes {' and '.join(uneven)}: drop one of them")
    if uneven and pipeline == 1:
        return [*problems, f"{' and '.join(uneven)} needs more than {degree}; set it to null"]
    per_stage = _layers_per_stage(num_layers, pipeline, first, last)
    if uneven and (sum(per_stage) != num_layers or min(per_stage) < 1):
        problems.append(
            f"model.num_layers {num_layers} cannot be cut by {degree} with {' and '.join(uneven)}: a split of {per_stage} holds "
            f"{sum(per_stage)} layers; every stage needs one at least, and the middle ones equal shares"
        )
    elif not uneven and num_layers % (pipeline * virtual):
        chunks = f"{degree} x parallel.virtual_pipeline_model_parallel_size {virtual}" if virtual > 1 else degree
        multiple = -(-num_layers // (pipeline * virtual)) * pipeline * virtual
        problems.append(f"model.num_layers {num_layers} is not divisible by {chunks}; the next number of layers that is: {multiple}")
    return problems


def _nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` nearest to `wanted`, the smaller of two."""
    return min((divisor for divisor in range(1, 2 * wanted) if value % divisor == 0), key=lambda divisor: abs(divisor - wanted))
