"""What reading costs: indexed reads beside a NumPy gather of the same windows, and the loader's share of a training step.

python -m tests.benchmarks.loading            # both; the step of the 34M model takes a minute
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from largeformer.config.data import DataConfig
from largeformer.data.indexed import IndexedWriter, bin_path
from largeformer.data.loader import Batches, Reading
from largeformer.data.splits import build_splits
from largeformer.data.tokenization.tokenizer import MockTokenizer
from largeformer.data.windows import Windows

VOCAB, SEQ, TOKENS, ROUNDS, READS = 32000, 512, 8_000_000, 15, 1500
BATCH, MICRO = 16, 4


def corpus(folder: Path, mean: int) -> Windows:
    """Random ids in documents of `mean` tokens, exponentially spread."""
    random, prefix = np.random.default_rng(0), folder / f"0-{mean}"
    with IndexedWriter(prefix, VOCAB, 2) as writer:
        while writer.counts.tokens < TOKENS:
            writer.add(random.integers(3, VOCAB, 1 + int(random.exponential(mean))))
    data = DataConfig.model_validate({"split": "1,0,0", "sources": [{"path": "text"}]})
    train = build_splits(data, SEQ, MockTokenizer(VOCAB, eod=2), [(prefix, 1.0)], (TOKENS // SEQ * 4, 0, 0), 1, folder / "cache").train
    assert isinstance(train, Windows)
    return train


def gather(windows: Windows) -> Callable[[int], np.ndarray]:
    """The same windows by a memmap of the ids and where their pieces begin and end, worked out beforehand."""
    ids = np.memmap(bin_path(Path(windows.dataset.path_prefix)), dtype=windows.dataset.index.dtype, mode="r")
    item = ids.dtype.itemsize
    pieces = []
    for window in range(windows.windows):
        (first, skip), (last, end) = windows.sample_index[window].tolist(), windows.sample_index[window + 1].tolist()
        documents = windows.document_index[first : last + 1]
        begins = windows.dataset.index.sequence_pointers[documents] // item
        ends = begins + windows.dataset.sequence_lengths[documents]
        ends[-1], begins[0] = begins[-1] + end + 1, begins[0] + skip
        pieces.append(list(zip(begins.tolist(), ends.tolist(), strict=True)))
    return lambda window: np.concatenate([ids[begin:end] for begin, end in pieces[window]], dtype=np.int64)


def interleaved(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least seconds of each over rounds in which all take turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(ROUNDS):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def reads(folder: Path) -> None:
    print(f"reading windows of {SEQ} tokens: microseconds each, and speed as a multiple of the NumPy gather's")
    for mean in (100, 700, 5000):
        windows = corpus(folder, mean)
        by_numpy = gather(windows)
        order = np.random.default_rng(1).integers(0, windows.windows, READS).tolist()
        assert all(np.array_equal(windows.read(window), by_numpy(window)) for window in order[:200])
        place = {int(window): i for i, window in enumerate(np.asarray(windows.shuffle_index))}
        best = interleaved(
            {
                "memmap gather": lambda order=order, by_numpy=by_numpy: [by_numpy(window) for window in order],
                "largeformer": lambda order=order, windows=windows: [windows.read(window) for window in order],
                "GPTDataset": lambda order=order, windows=windows, place=place: [
                    GPTDataset._query_document_sample_shuffle_indices(windows, place[window]) for window in order
                ],
            }
        )
        for name, seconds in best.items():
            print(f"  documents of {mean:>4}: {name:<14} {seconds / READS * 1e6:7.1f} us   {best['memmap gather'] / seconds:.2f}x")


def in_the_loader(folder: Path, step_seconds: float) -> None:
    """A step is stood for by a wait of the time that one takes, in which the loader may run ahead."""
    windows = corpus(folder, 700)
    print(f"seconds that `next` takes, {BATCH} samples in micro batches of {MICRO}, as a share of a step of {step_seconds:.3f} s:")
    for workers in (0, 1, 2):
        loader = Batches(windows, lambda _: BATCH, Reading(MICRO, num_workers=workers))
        loader.next()
        taken = []
        for _ in range(12):
            time.sleep(min(step_seconds, 0.25))
            start = time.perf_counter()
            loader.next()
            taken.append(time.perf_counter() - start)
        print(f"  num_workers {workers}: {statistics.median(taken) * 1e3:.2f} ms   {statistics.median(taken) / step_seconds:.3%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-seconds", type=float, default=3.4, help="a step of the 34M model: 16 x 512 tokens at 2,400 tokens/s")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reads(Path(folder))
        in_the_loader(Path(folder), arguments.step_seconds)


if __name__ == "__main__":
    main()
