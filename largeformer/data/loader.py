"""From samples to batches. `b` micro batch, `s` sequence.

A sample is known by its position in the shuffled order, and each global batch is the next consecutive positions whatever the
layout: all that a resumed run must know is how many samples were consumed. docs/batches.md says what follows from that.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.synchronize import Event

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from largeformer.data.packing import Packing
from largeformer.data.sampling import LossWeighted
from largeformer.data.splits import Samples, SourceDraws, sample_of
from largeformer.data.windows import Sample
from largeformer.parallel.batch import Batch

_PREFETCHED = 8  # micro batches that a thread, or each loading process, is ahead
_STEPS_AHEAD = 2
_PLAIN = Packing()
_CPU = torch.device("cpu")
_LOOKS_EVERY_S = 1.0
_OF_THE_RANK = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


@dataclass(frozen=True)
class _MicroBatches(Dataset[Batch]):
    """A dataset indexed by micro batch: a sequence of sample ids -> Batch. What a loading thread or process runs.

    It stays with NumPy: PyTorch would start a second team of threads for it, which wait by spinning.
    """

    samples: Samples
    packing: Packing

    def __getitem__(self, ids: Sequence[int]) -> Batch:
        rows = [self.samples[i] for i in ids]
        tokens, labels, loss_mask = (np.stack([row[name] for row in rows]) for name in ("tokens", "labels", "loss_mask"))
        sources = np.array([row["dataset_id"] for row in rows], dtype=np.int64) if "dataset_id" in rows[0] else None
        return self.packing.batch(tokens, labels, loss_mask, tuple(ids), sources)


@dataclass(frozen=True)
class Reading:
    """How a data-parallel rank reads its part of each global batch, and which part that is.

    num_workers: loading processes; 0 is a thread. They run ahead, and change neither order nor content.
    device: where batches will go. For a GPU they are made in page-locked memory.
    """

    micro_batch_size: int
    data_rank: int = 0
    data_size: int = 1
    packing: Packing = _PLAIN
    device: torch.device = _CPU
    num_workers: int = 0

    def micro_batches(self, global_batch: Sequence[int]) -> list[tuple[int, ...]]:
        """The ids of this rank's micro batches, out of those of all ranks in their order: micro batch m of rank d is the places
        m (b x data_size) + d b and on."""
        b, step = self.micro_batch_size, self.micro_batch_size * self.data_size
        size = len(global_batch)
        assert size > 0 and size % step == 0, f"global batch {size} is not a multiple of micro batch x data parallel = {step}"
        return [tuple(global_batch[first : first + b]) for first in range(self.data_rank * b, size, step)]


@dataclass(frozen=True)
class _Consecutive:
    """A rank's micro batches from sample `start` to the last whole global batch: each of those is the next consecutive ids."""

    reading: Reading
    start: int
    stop: int
    global_batch_size: Callable[[int], int]

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        consumed = self.start
        while consumed + (size := self.global_batch_size(consumed)) <= self.stop:
            yield from self.reading.micro_batches(range(consumed, consumed + size))
            consumed += size


class Batches:
    """This data-parallel rank's share of one global batch after another, from `consumed_samples` on.

    batch_sizes: samples already consumed -> size of the next global batch (constant, or a ramp-up).
    """

    def __init__(self, dataset: Samples, batch_sizes: Callable[[int], int], reading: Reading, consumed_samples: int = 0) -> None:
        self._reading, self._size_of, self._stop = reading, batch_sizes, len(dataset)
        self._consumed = consumed_samples
        plan, load = _Consecutive(reading, consumed_samples, self._stop, batch_sizes), _MicroBatches(dataset, reading.packing)
        self._loaded = _in_processes(load, plan) if reading.num_workers else _in_a_thread(load, plan)

    @property
    def consumed_samples(self) -> int:
        """Samples handed out so far, over all ranks: what a checkpoint keeps."""
        return self._consumed

    def next(self) -> list[Batch]:
        """This rank's micro batches of the next global batch. Raises IndexError where the dataset has no whole one left, RuntimeError
        where a loading process died."""
        size = self._size_of(self._consumed)
        count = len(self._reading.micro_batches(range(size)))
        batches = list(islice(self._loaded, count))
        if len(batches) < count:
            raise IndexError(f"the dataset holds {self._stop} samples, {self._consumed} are consumed: no whole global batch is left")
        self._consumed += size
        return batches


class SourceBatches:
    """The same where the sources' shares follow the losses, always in a thread: it loads ahead up to the next change of shares.

    order: it stands at `consumed_samples`, and is told of each batch's losses before the next but `_STEPS_AHEAD`.
    """

    def __init__(
        self, dataset: SourceDraws, order: LossWeighted, batch_sizes: Callable[[int], int], reading: Reading, consumed_samples: int = 0
    ) -> None:
        self._dataset, self._order, self._size_of, self._reading = dataset, order, batch_sizes, reading
        self._load, self._thread = _on(reading.device, _MicroBatches(dataset, reading.packing)), _thread(reading.device)
        self._consumed = self._planned = consumed_samples
        self._steps: deque[tuple[int, list[Future[Batch]]]] = deque()

    @property
    def consumed_samples(self) -> int:
        return self._consumed

    def next(self) -> list[Batch]:
        while self._order.may_draw and len(self._steps) < _STEPS_AHEAD:
            size = self._size_of(self._planned)
            ids = [self._dataset.sample_id(source, place) for source, place in self._order.draw(size)]
            self._steps.append((size, [self._thread.submit(self._load, one) for one in self._reading.micro_batches(ids)]))
            self._planned += size
        size, loading = self._steps.popleft()
        batches = [one.result() for one in loading]
        self._consumed += size
        return batches


def _in_a_thread(load: _MicroBatches, plan: _Consecutive) -> Iterator[Batch]:
    """Loads a few micro batches ahead. The thread ends with the iterator."""
    device = plan.reading.device
    thread, make, ids = _thread(device), _on(device, load), iter(plan)
    loading = deque(thread.submit(make, one) for one in islice(ids, _PREFETCHED))
    while loading:
        batch = loading.popleft()
        loading.extend(thread.submit(make, one) for one in islice(ids, 1))
        yield batch.result()


def _in_processes(load: _MicroBatches, plan: _Consecutive) -> Iterator[Batch]:
    ending = multiprocessing.Event()
    loader = DataLoader(
        load,
        sampler=plan,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=plan.reading.num_workers,
        prefetch_factor=_PREFETCHED,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        pin_memory=plan.reading.device.type == "cuda",
        # Its own generator: else the loader draws a seed from torch's, and a resumed run would see other dropout.
        generator=torch.Generator(),
        worker_init_fn=partial(_leave_signals_to_the_rank, os.getpid(), ending),
    )
    # Blocked from their first moment on, not only once `_leave_signals_to_the_rank` has run. The rank gets what has come afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(ending.set)  # runs before multiprocessing ends its processes by SIGTERM, and waits for them
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(f"a loading process died ({error}): is memory short? data.num_workers 0 reads in a thread") from error
    finally:
        atexit.unregister(ending.set)


def _leave_signals_to_the_rank(rank: int, ending: Event, worker: int) -> None:
    """In a loading process: what a launcher sends to all processes passes it by, since the rank reads on until it has saved. Only
    SIGTERM from `rank`, a process id, ends it: that is how a rank that leaves its batches open ends what it waits for. A signal that
    finds another of its kind waiting is lost; that the rank is `ending` stands beyond that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RANK)
    threading.Thread(target=_end_with, args=(rank, ending), name="signals", daemon=True).start()


def _end_with(rank: int, ending: Event) -> None:
    while not ending.is_set():
        told = signal.sigtimedwait(_OF_THE_RANK, _LOOKS_EVERY_S)
        if told is not None and told.si_signo == signal.SIGTERM and told.si_pid == rank:
            break
    os._exit(0)


def _thread(device: torch.device) -> ThreadPoolExecutor:
    # A new thread stands on the first GPU, and would take memory there.
    choose = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
    return ThreadPoolExecutor(1, "loader", *choose)


def _on(device: torch.device, load: _MicroBatches) -> Callable[[Sequence[int]], Batch]:
    return (lambda ids: load[ids].pin_memory()) if device.type == "cuda" else load.__getitem__


def fixed_batches(dataset: Samples, iterations: int, global_batch_size: int, reading: Reading) -> Iterator[list[Batch]]:
    """This rank's share of the first `iterations` global batches: the same ones at each call, for validation during training."""
    batches = Batches(dataset, lambda _: global_batch_size, replace(reading, num_workers=0))
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

    def __getitem__(self, index: int) -> Sample:
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


def evaluation_windows(streams: Sequence[np.ndarray], seq_length: int, reading: Reading, eod: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the windows over `streams`: over all ranks every id is predicted exactly once.

    All ranks get equally many batches of one shape, int64[b, s], so that they stay in step; what fills up is masked. Documents are
    told apart as in training; each of their ids counts all the same, since text is measured and not chosen.
    """
    step = reading.micro_batch_size * reading.data_size
    windows = _Windows(streams, seq_length, eod, multiple=step)
    load = _MicroBatches(windows, replace(reading.packing, eod_mask_loss=False))
    return (load[ids] for ids in _Consecutive(reading, 0, len(windows), lambda _: step))


def _unchanged(batch: Batch) -> Batch:
    return batch
