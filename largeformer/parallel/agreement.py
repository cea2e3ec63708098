"""What ranks tell each other before any of them goes on: one rank's result, or every rank's troubles.

Waiting at a barrier for a rank that has failed is how runs hang; here a failure travels in the barrier's place. Values are pickled, between
our own processes. Without a process group there is one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from largeformer.errors import BadInputError

T = TypeVar("T")


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(value: T) -> list[T]:
    """Every rank's `value`, by rank, on every rank. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def from_main(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; the others wait. Collective. Bad input that it finds is raised on every rank as it
    is, anything else as RuntimeError on the others."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    failure: Exception | None = None
    held: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        try:
            held[0] = work()
        except BadInputError as error:
            failure, held[1] = error, error.problems
        except Exception as error:
            failure, held[2] = error, f"{type(error).__name__} on rank 0: {error}"
    dist.broadcast_object_list(held, src=0)
    result, problems, other = held
    if failure is not None:
        raise failure
    if problems is not None:
        raise BadInputError(problems)
    if other is not None:
        raise RuntimeError(other)
    return result  # type: ignore[no-any-return]
