"""Samples that a run leaves out: those between its newest checkpoint and a spike of the loss.

They are kept in a file of the stage's folder, not in a checkpoint: the one that the run goes back to was written before the spike, and a
run that dies after it must not meet the same samples again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from largeformer.artifact import write_atomically
from largeformer.errors import BadInputError
from largeformer.parallel.batch import Batch

FILE = "left_out.json"


@dataclass(frozen=True)
class Rewind:
    """Back from step `spike_step` to step `step`; the samples from `first` to before `end` are left out from then on."""

    step: int
    spike_step: int
    first: int
    end: int
    loss: float
    z_score: float


def read_rewinds(folder: Path) -> list[Rewind]:
    """The rewinds of the run in `folder`; none where there were none. Raises BadInputError where the file is broken."""
    path = folder / FILE
    try:
        return [Rewind(**record) for record in json.loads(path.read_bytes())]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise BadInputError(
            f"{path} is broken ({error}): it names samples that are left out for a spike; restore it, or delete it to train on them"
        ) from error


def write_rewinds(folder: Path, rewinds: Sequence[Rewind]) -> None:
    write_atomically(folder / FILE, (json.dumps([asdict(rewind) for rewind in rewinds], indent=2) + "\n").encode())


class Source(Protocol):
    @property
    def consumed_samples(self) -> int: ...

    def next(self) -> list[Batch]: ...


class LeavingOut:
    """A source of batches without the samples of `rewinds`. `open_at` gives the source from a sample on.

    A window begins where a checkpoint was, and ends where a batch did, so that no batch lies across its edges.
    """

    def __init__(self, open_at: Callable[[int], Source], consumed_samples: int, rewinds: Sequence[Rewind]) -> None:
        self._open_at = open_at
        self._ends = {rewind.first: rewind.end for rewind in rewinds}
        self._source = open_at(self._past(consumed_samples))

    @property
    def consumed_samples(self) -> int:
        """The place in the order of samples; what was left out counts."""
        return self._source.consumed_samples

    def next(self) -> list[Batch]:
        batches = self._source.next()
        if (place := self._past(self.consumed_samples)) != self.consumed_samples:
            self._source = self._open_at(place)
        return batches

    def _past(self, sample: int) -> int:
        while sample in self._ends:
            sample = self._ends[sample]
        return sample
