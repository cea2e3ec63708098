"""Resumed after any step, at any micro batch, data-parallel size or number of loading processes, the samples are those that an
uninterrupted run sees, in its order: ids and tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largeformer.config.data import DataConfig
from largeformer.config.schema import RampupConfig, TrainConfig
from largeformer.data.loader import Batches, Reading, SourceBatches
from largeformer.data.packing import Packing
from largeformer.data.ramp import BatchSizes
from largeformer.data.sampling import LossWeighted
from largeformer.data.splits import Samples, SourceDraws, build_splits
from tests.data.test_splits import EOD, SEQ, TOKENIZER, write_source

GLOBAL, STEPS = 8, 14
LAYOUTS = [(size, micro) for size in (1, 2, 4) for micro in (1, 2, 4, 8) if GLOBAL % (size * micro) == 0]
Row = tuple[int, tuple[int, ...], tuple[int, ...]]  # id, tokens, segments


@dataclass(frozen=True)
class Case:
    """`documents` of each source: few make an epoch short, so that 14 steps are several."""

    documents: tuple[int, ...]
    sampling: dict[str, Any] = field(default_factory=lambda: {"type": "random"})
    rampup: RampupConfig | None = None


CASES = {
    "part of an epoch": Case((150,)),
    "several epochs": Case((12,)),
    "a blend, several epochs of one source": Case((8, 150, 30)),
    "ramp-up": Case((40,), rampup=RampupConfig(start=4, increment=4, samples=30)),
    "curriculum": Case((30, 30), {"type": "curriculum", "difficulty": "rarity", "pacing": "root", "span": 0.7}),
    "curriculum, sorted": Case((30,), {"type": "curriculum", "difficulty": "length", "pacing": "sorted"}),
    "temperature": Case((10, 90), {"type": "temperature", "temperature": 3.0}),
}


def sizes_of(case: Case) -> BatchSizes:
    return BatchSizes(TrainConfig(micro_batch_size=1, global_batch_size=GLOBAL, train_iters=STEPS, rampup_batch_size=case.rampup))


def samples_of(case: Case, folder: Path) -> Samples:
    prefixes = [(write_source(folder / f"{i}-s", count, i), float(i + 1)) for i, count in enumerate(case.documents)]
    data = DataConfig.model_validate({"split": "1,0,0", "sources": [{"path": "text"}] * len(prefixes), "sampling": case.sampling})
    train = build_splits(data, SEQ, TOKENIZER, prefixes, (sizes_of(case).samples_after(STEPS), 0, 0), 11, folder / "cache").train
    assert train is not None
    return train


def global_batches(ranks: list[Any], observe: Callable[[int], None] = lambda _: None) -> Iterator[list[Row]]:
    """Global batches put together from what each data-parallel rank loads, its rows in the order of their places."""
    for step in itertools.count():
        loaded = [rank.next() for rank in ranks]
        rows: list[Row] = []
        for micro in zip(*loaded, strict=True):
            for batch in micro:
                assert batch.segment_ids is not None
                rows += zip(batch.sample_ids, map(tuple, batch.tokens.tolist()), map(tuple, batch.segment_ids.tolist()), strict=True)
        yield rows
        observe(step)


PACKING = Packing(EOD, reset_attention_mask=True)


def loaders(samples: Samples, case: Case, size: int, micro: int, consumed: int, workers: int = 0) -> list[Batches]:
    readings = [Reading(micro, rank, size, PACKING, num_workers=workers) for rank in range(size)]
    return [Batches(samples, sizes_of(case).at, reading, consumed) for reading in readings]


@pytest.mark.parametrize("name", CASES)
def test_every_step_at_every_layout(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    samples = samples_of(case, tmp_path)
    straight = list(itertools.islice(global_batches(loaders(samples, case, 1, 1, 0)), STEPS))
    assert [row[0] for step in straight for row in step] == list(range(sizes_of(case).samples_after(STEPS)))
    assert len({row[1] for step in straight for row in step}) > GLOBAL
    for (size, micro), stop in zip(itertools.cycle(LAYOUTS), [*range(STEPS)] * 2, strict=False):
        smallest = case.rampup.start if case.rampup else GLOBAL
        if smallest % (size * micro):
            continue
        resumed = global_batches(loaders(samples, case, size, micro, sizes_of(case).samples_after(stop)))
        assert list(itertools.islice(resumed, STEPS - stop)) == straight[stop:], f"from step {stop} on DP {size}, micro batch {micro}"


@pytest.mark.parametrize("workers", [1, 3])
def test_loading_processes_change_nothing(workers: int, tmp_path: Path) -> None:
    case = CASES["a blend, several epochs of one source"]
    samples = samples_of(case, tmp_path)
    straight = list(itertools.islice(global_batches(loaders(samples, case, 1, 8, 0)), STEPS))
    resumed = global_batches(loaders(samples, case, 2, 2, 5 * GLOBAL, workers))
    assert list(itertools.islice(resumed, STEPS - 5)) == straight[5:]


def test_another_build_of_the_same_data_is_the_same_order(tmp_path: Path) -> None:
    """A resumed run may have lost its index files, and has another `train_iters` behind its last step at the most."""
    case = CASES["several epochs"]
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
    one, other = samples_of(case, tmp_path / "one"), samples_of(case, tmp_path / "other")
    assert all(np.array_equal(one[i]["tokens"], other[i]["tokens"]) for i in range(STEPS * GLOBAL))


def losses_after(step: int) -> np.ndarray:
    return np.array([3.0 - 0.1 * step, 1.0 + 0.2 * step])


def followed(
    samples: SourceDraws, size: int, micro: int, consumed: int, state: dict[str, Any] | None
) -> tuple[list[Any], list[LossWeighted]]:
    orders = [LossWeighted(samples.shares, (5,), power=1.0, interval=4, decay=0.5, floor=0.1) for _ in range(size)]
    for order in orders:
        if state is not None:
            order.load_state_dict(state)
    readings = [Reading(micro, rank, size, PACKING) for rank in range(size)]
    batches = [SourceBatches(samples, order, lambda _: GLOBAL, own, consumed) for order, own in zip(orders, readings, strict=True)]
    return batches, orders


def test_sources_that_follow_their_losses(tmp_path: Path) -> None:
    samples = samples_of(Case((20, 60), {"type": "loss", "interval": 4}), tmp_path)
    assert isinstance(samples, SourceDraws)
    straight: list[list[Row]] = []
    states: list[dict[str, Any]] = []
    batches, (order,) = followed(samples, 1, 1, 0, None)
    for step in range(STEPS):
        states.append(json.loads(json.dumps(order.state_dict())))
        straight.append(next(global_batches(batches)))
        assert batches[0].consumed_samples == (step + 1) * GLOBAL
        order.observe(losses_after(step))
    for stop, (size, micro) in zip(range(STEPS), itertools.cycle(LAYOUTS), strict=False):
        resumed, orders = followed(samples, size, micro, stop * GLOBAL, states[stop])

        def observe(step: int, stop: int = stop, orders: list[LossWeighted] = orders) -> None:
            for order in orders:
                order.observe(losses_after(stop + step))

        assert list(itertools.islice(global_batches(resumed, observe), STEPS - stop)) == straight[stop:], f"step {stop}, DP {size}, {micro}"


def test_tokens_of_a_resumed_batch_are_int64(tmp_path: Path) -> None:
    batch = loaders(samples_of(CASES["several epochs"], tmp_path), CASES["several epochs"], 1, 2, 16)[0].next()[0]
    assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
