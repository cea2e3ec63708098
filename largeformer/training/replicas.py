"""Data-parallel ranks hold copies of the same weights, and each updates its own by the same gradients. A copy that differs by one bit goes
its own way from then on, without an error: by faulty memory, a broken kernel, a collective that lost a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from largeformer.parallel.agreement import gather
from largeformer.parallel.groups import ParallelGroups
from largeformer.training.anomalies import RunStopped

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Replicas:
    """Compares the copies every `interval` steps; None: never. Under ZeRO 3 only what it leaves whole on every rank has copies."""

    def __init__(self, interval: int | None, chunks: Sequence[torch.nn.Module], groups: ParallelGroups) -> None:
        self._interval = interval if groups.layout.data > 1 else None
        self._chunks = chunks
        self._groups = groups

    def check(self, step: int) -> None:
        """Raises RunStopped, on every rank, naming the rank that differs. Collective at the end of an interval."""
        if self._interval is None or step % self._interval:
            return
        problems = [problem for problem in gather(self._problem()) if problem is not None]
        if problems:
            raise RunStopped(
                f"replicas differ at step {step}: {'; '.join(dict.fromkeys(problems))}. The memory of that rank's device or machine may be "
                "faulty. The same command goes on from the newest checkpoint; one saved since the last good check may hold the fault"
            )

    def _problem(self) -> str | None:
        """What is wrong in this rank's data-parallel group, as its first rank tells it."""
        named = list(_whole_parameters(self._chunks))
        if not named:
            return None
        mine = torch.stack([digest(parameter) for _, parameter in named])
        sums = [torch.empty_like(mine) for _ in range(self._groups.layout.data)]
        dist.all_gather(sums, mine, group=self._groups.data)
        if self._groups.coordinates.data != 0:
            return None
        copies = torch.stack(sums).tolist()
        ranks = dist.get_process_group_ranks(self._groups.data)
        return next((told for i, (name, _) in enumerate(named) if (told := disagreement(name, [copy[i] for copy in copies], ranks))), None)


def digest(parameter: torch.Tensor) -> torch.Tensor:
    """int64[]: the sum of the parameter's words, so that any one bit that differs shows."""
    words = parameter.detach().contiguous().view(-1).view(_WORDS[parameter.element_size()])
    return words.sum(dtype=torch.int64)


def disagreement(name: str, digests: Sequence[int], ranks: Sequence[int]) -> str | None:
    """A sentence where the copies of parameter `name` on `ranks` are not all the same. More than half of them decide which are right."""
    (usual, count), *others = Counter(digests).most_common()
    if not others:
        return None
    if 2 * count <= len(digests):
        return f"{name} is not the same on ranks {', '.join(map(str, ranks))}, and there is no majority to tell which is wrong"
    wrong = [rank for rank, digest_ in zip(ranks, digests, strict=True) if digest_ != usual]
    which = f"rank {wrong[0]} is" if len(wrong) == 1 else f"ranks {', '.join(map(str, wrong))} are"
    return f"{name} on {which} not as on the other {count}"


def _whole_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            if getattr(parameter, "ds_numel", parameter.numel()) == parameter.numel():
                yield (f"{name} of chunk {number}" if len(chunks) > 1 else name), parameter
