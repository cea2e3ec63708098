"""A step of a pipeline, operation by operation: when each begins and ends, and how long stages wait.

Every data-parallel copy of the pipeline does the same, and so do the tensor-parallel ranks of a stage: the timelines of `pipeline`
stages stand for a world of any size. What differs between stages (their layers, embedding and head) is simulated as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from largeformer.planning.schedule import op_order


@dataclass(frozen=True)
class Timeline:
    """seconds: from the first operation to the last. busy: each stage's time at work. ends: when each stage is done."""

    seconds: float
    busy: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def bubble(self) -> float:
        """Time lost to waiting, relative to the work of the stage that has most: (p - 1) / m where all stages are alike."""
        return self.seconds / max(self.busy) - 1.0


def simulate(forward: Sequence[Sequence[float]], backward: Sequence[Sequence[float]], microbatches: int, transfer: float = 0.0) -> Timeline:
    """`forward`, `backward`: seconds of one micro batch by [stage][chunk]; `transfer`: seconds from one stage to the next."""
    pipeline, virtual = len(forward), len(forward[0])
    orders = [op_order(stage, pipeline, virtual, microbatches) for stage in range(pipeline)]
    # When the input of [place][micro batch] is there; a place is a chunk of a stage, in the order of the model's layers.
    places = pipeline * virtual
    unknown = -1.0
    ready = [[[unknown] * microbatches for _ in range(places)] for _ in range(2)]
    ready[0][0] = [0.0] * microbatches
    position, clock, busy = [0] * pipeline, [0.0] * pipeline, [0.0] * pipeline
    waiting, queued = deque(range(pipeline)), [True] * pipeline
    while waiting:
        stage = waiting.popleft()
        queued[stage] = False
        order, now = orders[stage], clock[stage]
        woken = set()
        while position[stage] < len(order):
            is_backward, microbatch, chunk = order[position[stage]]
            place = chunk * pipeline + stage
            start = ready[is_backward][place][microbatch]
            if start == unknown:
                break
            seconds = (backward if is_backward else forward)[stage][chunk]
            now = max(now, start) + seconds
            busy[stage] += seconds
            position[stage] += 1
            if is_backward:
                if place > 0:
                    ready[1][place - 1][microbatch] = now + transfer
                    woken.add((stage - 1) % pipeline)
            elif place + 1 < places:
                ready[0][place + 1][microbatch] = now + transfer
                woken.add((stage + 1) % pipeline)
            else:  # the loss is here: its backward may follow
                ready[1][place][microbatch] = now
        clock[stage] = now
        for other in woken:
            if not queued[other]:
                queued[other] = True
                waiting.append(other)
    assert all(position[stage] == len(orders[stage]) for stage in range(pipeline)), "the schedule waits for itself"
    return Timeline(max(clock), tuple(busy), tuple(clock))
