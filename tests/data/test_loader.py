from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from largeformer.config.data import DataConfig
from largeformer.data.loader import Batches, Reading, evaluation_windows, fixed_batches
from largeformer.data.splits import MockSamples, build_splits
from largeformer.data.tokenization.tokenizer import MockTokenizer
from largeformer.parallel.batch import Batch

SEQ, VOCAB, EOD = 8, 500, 2
SAMPLES = MockSamples(SEQ, VOCAB, 64, (1, 0))


def batches(
    micro: int, rank: int = 0, size: int = 1, total: Callable[[int], int] = lambda _: 8, num_workers: int = 0, consumed_samples: int = 0
) -> Batches:
    return Batches(SAMPLES, total, Reading(micro, rank, size, num_workers=num_workers), consumed_samples)


def ids(step: list[Batch]) -> list[tuple[int, ...]]:
    return [batch.sample_ids for batch in step]


def test_micro_batches_hold_the_ids_of_the_formula() -> None:
    """Micro batch m of data rank d: consumed + m (b x data) + d b, for b = 2 on 2 ranks and a global batch of 8."""
    first, second = (batches(2, rank, 2) for rank in range(2))
    assert (ids(first.next()), ids(second.next())) == ([(0, 1), (4, 5)], [(2, 3), (6, 7)])
    assert (ids(first.next()), ids(second.next())) == ([(8, 9), (12, 13)], [(10, 11), (14, 15)])
    assert first.consumed_samples == second.consumed_samples == 16


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)])
def test_a_global_batch_is_the_same_samples_at_any_layout(size: int, micro: int) -> None:
    of_ranks = [batches(micro, rank, size) for rank in range(size)]
    for step in range(8):
        parts = [loader.next() for loader in of_ranks]
        assert len({len(part) for part in parts}) == 1
        rows = {}
        for part in parts:
            for batch in part:
                assert batch.tokens.shape == (micro, SEQ) and batch.tokens.dtype == torch.int64
                assert batch.loss_mask.shape == (micro, SEQ) and batch.loss_mask.dtype == torch.float32
                rows.update(zip(batch.sample_ids, batch.tokens, strict=True))
        assert sorted(rows) == list(range(8 * step, 8 * step + 8))
        assert all(np.array_equal(rows[i], SAMPLES[i]["tokens"]) for i in rows)


def same(one: list[Batch], other: list[Batch]) -> bool:
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return ids(one) == ids(other) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(one, other, strict=True) for name in names
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_goes_on_with_the_next_sample(workers: int) -> None:
    straight = batches(2, 1, 2)
    expected = [straight.next() for _ in range(8)]
    before = batches(2, 1, 2, num_workers=workers)
    got = [before.next() for _ in range(3)]
    after = batches(2, 1, 2, num_workers=workers, consumed_samples=before.consumed_samples)
    got += [after.next() for _ in range(5)]
    assert all(same(one, other) for one, other in zip(got, expected, strict=True))


def test_a_resumed_run_may_have_another_layout() -> None:
    before = [batches(4, rank, 2) for rank in range(2)]
    for loader in before:
        loader.next()
    after = batches(1, consumed_samples=before[0].consumed_samples)
    assert ids(after.next()) == [(i,) for i in range(8, 16)]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_torchs_random_state_alone(workers: int) -> None:
    before = torch.get_rng_state()
    batches(2, num_workers=workers).next()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_ramp_up_changes_the_size_of_the_global_batch() -> None:
    def size(consumed: int) -> int:
        return 4 if consumed < 8 else 8

    of_ranks = [batches(2, rank, 2, size) for rank in range(2)]
    steps = [[ids(loader.next()) for loader in of_ranks] for _ in range(3)]
    assert steps == [[[(0, 1)], [(2, 3)]], [[(4, 5)], [(6, 7)]], [[(8, 9), (12, 13)], [(10, 11), (14, 15)]]]
    assert of_ranks[0].consumed_samples == 16


@pytest.mark.parametrize("workers", [0, 1])
def test_the_end_of_the_data_is_an_error_not_a_short_batch(workers: int) -> None:
    loader = batches(4, num_workers=workers, total=lambda _: 24)
    assert len(loader.next()) == len(loader.next()) == 6
    with pytest.raises(IndexError, match="64 samples, 48 are consumed"):
        loader.next()


def test_validation_reads_the_same_batches_each_time() -> None:
    once, again = (list(fixed_batches(SAMPLES, 2, 8, Reading(2, 1, 2))) for _ in range(2))
    assert [ids(step) for step in once] == [[(2, 3), (6, 7)], [(10, 11), (14, 15)]]
    assert all(same(one, other) for one, other in zip(once, again, strict=True))


STREAMS = {
    "whole windows": [32],
    "a short last window": [35],
    "one token": [1],
    "shorter than a window": [5],
    "two streams": [35, 17],
    "an empty one between": [9, 0, 8],
}


@pytest.mark.parametrize("lengths", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize(("size", "micro"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_every_token_is_predicted_once_from_all_before_it_in_its_window(lengths: list[int], size: int, micro: int) -> None:
    start = 10
    streams = []
    for length in lengths:  # every id occurs once, over all streams
        streams.append(np.arange(start, start + length, dtype=np.uint16))
        start += length
    parts = [list(evaluation_windows(streams, SEQ, Reading(micro, rank, size), EOD)) for rank in range(size)]
    assert len({len(part) for part in parts}) == 1, "ranks must stay in step"
    predicted = []
    for batch in (batch for part in parts for batch in part):
        assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.position_ids.shape == (micro, SEQ)
        for tokens, labels, mask in zip(batch.tokens, batch.labels, batch.loss_mask, strict=True):
            counted = mask.bool()
            predicted += labels[counted].tolist()
            # Whatever is predicted follows the token at its position: its predecessor, or the end of a document before the first.
            firsts = {int(stream[0]) for stream in streams if len(stream)}
            expected = [EOD if label in firsts else label - 1 for label in labels[counted].tolist()]
            assert tokens[counted].tolist() == expected
    assert sorted(predicted) == list(range(10, start))


def test_windows_hold_the_split_of_a_real_file(tmp_path: Path) -> None:
    """Evaluation and training see the same split: their ids, sorted, are the same but for the last part of a window."""
    from largeformer.data.splits import held_out_streams
    from tests.data.test_splits import write_source

    prefix, data, tokenizer = write_source(tmp_path / "0-a", 80, 3), DataConfig(split="50,25,25"), MockTokenizer(1000, eod=EOD)
    streams = held_out_streams(data, [(prefix, 1.0)], tokenizer, "test")
    windows = list(evaluation_windows(streams, SEQ, Reading(1), EOD))
    counted = np.concatenate([batch.labels[batch.loss_mask.bool()].numpy() for batch in windows])
    assert counted.tolist() == streams[0].tolist()
    test = build_splits(data, SEQ, tokenizer, [(prefix, 1.0)], (0, 0, (len(counted) - 1) // SEQ), 1, tmp_path / "cache").test
    assert test is not None
    seen = np.bincount(np.concatenate([test[i]["tokens"] for i in range((len(counted) - 1) // SEQ)]), minlength=1000)
    assert (seen <= np.bincount(counted, minlength=1000)).all()


class Slow:
    """Samples whose loading waits until a file is there, and says who loads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= 8:
            (self.folder / f"{os.getpid()}.pid").touch()
            signal.pause()
        return SAMPLES[index]


def test_a_loading_process_that_dies_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    loader = Batches(Slow(tmp_path), lambda _: 8, Reading(8, num_workers=1))
    loader.next()
    killer = threading.Thread(target=kill_when_there, args=(tmp_path,))
    killer.start()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        loader.next()
    killer.join()


def kill_when_there(folder: Path) -> None:
    while not (found := list(folder.glob("*.pid"))):
        threading.Event().wait(0.01)
    os.kill(int(found[0].stem), signal.SIGKILL)


def test_an_error_while_reading_is_told_by_next() -> None:
    class Broken(MockSamples):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Batches(Broken(SEQ, VOCAB, 64, (1,)), lambda _: 8, Reading(8)).next()


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_left_behind(workers: int) -> None:
    """No thread, process or shared memory, though more was loaded ahead than used."""

    def there() -> set[object]:
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("loader")]
        memory = [name for name in os.listdir("/dev/shm") if name.startswith("torch")]
        return {*threads, *(child.pid for child in multiprocessing.active_children()), *memory}

    before = there()
    loader = batches(2, num_workers=workers)
    loader.next()
    made = there() - before
    assert len(made) >= max(workers, 1)
    del loader
    gc.collect()
    for one in made:
        if isinstance(one, threading.Thread):
            one.join(timeout=30)
    assert there() <= before
