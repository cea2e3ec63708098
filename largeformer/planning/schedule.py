"""In which order a pipeline stage works: one forward one backward, plain or interleaved (Narayanan et al. 2021, arXiv:2104.04473, 2.2).

It is Megatron-core's order, operation by operation; a test records what the library's schedules do and compares. Made here by
rule, so that a plan needs neither torch nor as many processes as the pipeline has stages.
"""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    """One micro batch through one chunk (virtual stage) of a pipeline stage."""

    backward: bool
    microbatch: int
    chunk: int


def op_order(stage: int, pipeline: int, virtual: int, microbatches: int) -> list[Op]:
    """What `stage` does in a step. With virtual stages `microbatches` is a multiple of `pipeline`, as the library asks."""
    table = _table(pipeline, virtual, microbatches)
    forwards = [Op(False, microbatch, chunk) for microbatch, chunk in table]
    backwards = [Op(True, microbatch, virtual - 1 - chunk) for microbatch, chunk in table]
    warmup = min(_warmup(stage, pipeline, virtual), len(table))
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += (forward, backward)
    return order + backwards[len(table) - warmup :]


def held_forwards(stage: int, pipeline: int, virtual: int, microbatches: int) -> list[int]:
    """For each chunk, how many micro batches wait for their backward when the stage holds most: after the first forward that
    follows the warmup, since from there on every forward has its backward."""
    held = [0] * virtual
    first = _table(pipeline, virtual, min(microbatches, 2 * pipeline))[: _warmup(stage, pipeline, virtual) + 1]
    for _, chunk in first:
        held[chunk] += 1
    return held


def _table(pipeline: int, virtual: int, microbatches: int) -> list[tuple[int, int]]:
    """Micro batches and chunks in forward order: `pipeline` micro batches through each chunk in turn."""
    if virtual == 1:
        return [(microbatch, 0) for microbatch in range(microbatches)]
    return [
        (microbatch, chunk)
        for begin in range(0, microbatches, pipeline)
        for chunk in range(virtual)
        for microbatch in range(begin, min(begin + pipeline, microbatches))
    ]


def _warmup(stage: int, pipeline: int, virtual: int) -> int:
    """Forwards before the first backward."""
    behind = pipeline - stage - 1
    return behind if virtual == 1 else 2 * behind + (virtual - 1) * pipeline
