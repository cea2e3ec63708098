"""From samples to batches. `b` micro batch, `s` sequence.

A sample is known by its position in the shuffled order, and each global batch is the next consecutive positions whatever the
layout: all that a resumed run must know is how many samples were consumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from largeformer.data.splits import Samples, sample_of
from largeformer.parallel.batch import Batch


@dataclass(frozen=True)
class _MicroBatches(Dataset[Batch]):
    """A dataset indexed by micro batch: a sequence of sample ids -> Batch. What a loading process runs."""

    samples: Samples

    def __getitem__(self, ids: Sequence[int]) -> Batch:
        rows = [self.samples[i] for i in ids]
        tokens, labels, loss_mask, position_ids = (
            torch.stack([row[name] for row in rows]) for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        return Batch(tokens, labels, loss_mask, position_ids, tuple(ids))


@dataclass(frozen=True)
class _Plan:
    """Which samples this rank loads: one tuple of ids a micro batch, from `start` to the last whole global batch.

    Micro batch m of data rank d holds the ids from start + m (b x data_size) + d b: a global batch is the same consecutive
    ids whatever the layout.
    """

    micro_batch_size: int
    data_rank: int
    data_size: int
    start: int
    stop: int
    global_batch_size: Callable[[int], int]

    def count(self, consumed: int) -> int:
        """Micro batches of this rank in the global batch that begins at sample `consumed`."""
        size, step = self.global_batch_size(consumed), self.micro_batch_size * self.data_size
        assert size > 0 and size % step == 0, f"global batch {size} is not a multiple of micro batch x data parallel = {step}"
        return size // step

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        consumed, step = self.start, self.micro_batch_size * self.data_size
        while consumed + self.global_batch_size(consumed) <= self.stop:
            count = self.count(consumed)
            first = consumed + self.data_rank * self.micro_batch_size
            for micro in range(count):
                begin = first + micro * step
                yield tuple(range(begin, begin + self.micro_batch_size))
            consumed += count * step


class Batches:
    """This data-parallel rank's share of one global batch after another, from `consumed_samples` on.

    batch_sizes: samples already consumed -> size of the next global batch (constant, or a ramp-up).
    num_workers: loading processes; they run ahead, and change neither order nor content.
    """

    def __init__(
        self,
        dataset: Samples,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        *,
        batch_sizes: Callable[[int], int],
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        assert 0 <= data_rank < data_size
        self._plan = _Plan(micro_batch_size, data_rank, data_size, consumed_samples, len(dataset), batch_sizes)
        self._consumed = consumed_samples
        loader = DataLoader(
            _MicroBatches(dataset),
            sampler=self._plan,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            collate_fn=_unchanged,  # type: ignore[arg-type]
            # Its own generator: else the loader draws a seed from torch's, and a resumed run would see other dropout.
            generator=torch.Generator(),
        )
        self._loaded = iter(loader)

    @property
    def consumed_samples(self) -> int:
        """Samples handed out so far, over all ranks: what a checkpoint keeps."""
        return self._consumed

    def next(self) -> list[Batch]:
        """This rank's micro batches of the next global batch. Raises IndexError where the dataset has no whole one left."""
        count = self._plan.count(self._consumed)
        batches = list(islice(self._loaded, count))
        if len(batches) < count:
            raise IndexError(f"the dataset holds {self._plan.stop} samples, {self._consumed} are consumed: no whole global batch is left")
        self._consumed += count * self._plan.micro_batch_size * self._plan.data_size
        return batches


def fixed_batches(
    dataset: Samples, iterations: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[list[Batch]]:
    """This rank's share of the first `iterations` global batches: the same ones at each call, for validation during training."""
    batches = Batches(dataset, micro_batch_size, data_rank, data_size, batch_sizes=lambda _: global_batch_size)
    return (batches.next() for _ in range(iterations))


@dataclass(frozen=True)
class _Windows:
    """Streams of ids cut into windows of `s` that do not overlap; from the last window on, samples in which nothing counts.

    The first id of a stream is predicted from `eod`, as if another document had just ended, so that no id goes uncounted.
    """

    streams: Sequence[np.ndarray]
    seq_length: int
    eod: int
    multiple: int

    def __len__(self) -> int:
        windows = sum(-(-len(stream) // self.seq_length) for stream in self.streams)
        return -(-windows // self.multiple) * self.multiple

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        for stream in self.streams:
            windows = -(-len(stream) // self.seq_length)
            if index < windows:
                start = index * self.seq_length
                labels = np.asarray(stream[start : start + self.seq_length])
                before = stream[start - 1] if start else self.eod
                return sample_of(np.append(before, labels[:-1]), labels, self.seq_length)
            index -= windows
        nothing = np.empty(0, dtype=np.int64)
        return sample_of(nothing, nothing, self.seq_length)


def evaluation_windows(
    streams: Sequence[np.ndarray], seq_length: int, micro_batch_size: int, data_rank: int = 0, data_size: int = 1, *, eod: int
) -> Iterator[Batch]:
    """This data-parallel rank's part of the windows over `streams`: over all ranks every id is predicted exactly once.

    All ranks get equally many batches of one shape, int64[b, s], so that they stay in step; what fills up is masked.
    """
    step = micro_batch_size * data_size
    windows = _Windows(streams, seq_length, eod, multiple=step)
    load = _MicroBatches(windows)
    return (load[ids] for ids in _Plan(micro_batch_size, data_rank, data_size, 0, len(windows), lambda _: step))


def _unchanged(batch: Batch) -> Batch:
    return batch
