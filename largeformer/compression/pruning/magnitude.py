"""Which weights are smallest, over all ranks that hold a part of them, without bringing them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_BITS = 31  # of a float32 that is not negative: as an integer it has the same order


def kth_smallest(
    values: Sequence[Sequence[torch.Tensor]], counts: Sequence[int], total: Callable[[torch.Tensor], torch.Tensor]
) -> list[float]:
    """Of each list of float32 magnitudes, of which this rank holds a part, the `count`-th smallest of all ranks; -1 for a count of 0. By
    bisection. `total`: adds up int64[lists] over the ranks. Collective over these."""
    bits = [[part.view(torch.int32) for part in parts] for parts in values]
    low, high = [0] * len(bits), [2**_BITS - 1] * len(bits)
    for _ in range(_BITS):
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        below = total(torch.tensor([sum(int((part <= at).sum()) for part in parts) for parts, at in zip(bits, middle, strict=True)]))
        for index, (at, count) in enumerate(zip(middle, counts, strict=True)):
            if int(below[index]) >= count:
                high[index] = at
            else:
                low[index] = at + 1
    found = torch.tensor(high, dtype=torch.int64).clamp_max(2**_BITS - 1).to(torch.int32).view(torch.float32).tolist()
    return [value if count else -1.0 for value, count in zip(found, counts, strict=True)]
