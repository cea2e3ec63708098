"""From indexed files to train, valid and test samples. `s` sequence.

    IndexedDataset (.bin/.idx)      documents of one source
      -> Windows                    one split of it: documents shuffled and joined, cut every s tokens; in which order
      -> BlendedDataset             the sources in their weights, where there are several

The order of samples depends on the seed, the data, s and the number of samples asked for; never on the layout. Within one epoch
this is what Megatron-core's own builder makes, with three differences: it needs no process group; a split in which a source has
no document is noticed, not waited for; index files on disk are complete or not there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize

from largeformer.artifact import identity_hash
from largeformer.config.data import DataConfig
from largeformer.config.sampling import CurriculumSampling, LossSampling, TemperatureSampling
from largeformer.data.difficulty import order_windows
from largeformer.data.indexed import SPLITS, SplitName, bin_path, open_indexed, split_documents, split_tokens
from largeformer.data.sampling import temperature_shares
from largeformer.data.tokenization.tokenizer import MockTokenizer, Tokenizer
from largeformer.data.windows import Sample, Windows
from largeformer.errors import BadInputError

logger = logging.getLogger(__name__)
_MOCK_HELD_OUT_TOKENS = 8192
_POLL_S = 0.2


class Samples(Protocol):
    """What a batch is made of: `samples[i]` holds `tokens`, `labels` (int64[s]), `loss_mask` (float32[s]), and the number of its
    source as `dataset_id` where there are several."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class Splits:
    """The three parts of the data, as ordered samples; None where no sample was asked for."""

    train: Samples | None
    valid: Samples | None
    test: Samples | None


def build_splits(
    data: DataConfig,
    seq_length: int,
    tokenizer: Tokenizer | MockTokenizer,
    prefixes: Sequence[tuple[Path, float]],
    samples: tuple[int, int, int],
    seed: int,
    cache_dir: Path,
    mock: bool = False,
) -> Splits:
    """At least `samples` samples of train, valid and test, from the sources' indexed files and weights (or random tokens).

    Works without a process group. With one, every rank must call it: global rank 0 builds the index files below `cache_dir`, which
    all ranks must see, and the others wait. Raises BadInputError where a split that is asked for holds no document.
    """
    if mock or data.is_mock:
        random = [MockSamples(seq_length, tokenizer.vocab_size, count, (seed, i)) if count else None for i, count in enumerate(samples)]
        return Splits(*random)
    sources = [(open_indexed(path, tokenizer.vocab_size), weight) for path, weight in prefixes]
    parts = _parts(data.splits, sources, samples)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([path.name for path, _ in prefixes], [weight for _, weight in prefixes]),
        split="1,1,1",  # part of no more than the library's own checks: the documents of a part are given
        tokenizer=tokenizer,  # type: ignore[arg-type]
        reset_position_ids=False,  # documents are told apart when a batch is made
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def build(folder: Path) -> Splits:
        cached = replace(config, path_to_cache=str(folder))
        train, valid, test = (_windows(part, count, split, cached) for part, count, split in zip(parts, samples, Split, strict=True))
        return Splits(
            _training(data, train, samples[0], cached, folder), _blend(valid, samples[1], cached), _blend(test, samples[2], cached)
        )

    key = {
        "files": [_fingerprint(path) for path, _ in prefixes],
        "weights": [weight for _, weight in prefixes],
        "config": [seed, seq_length, data.splits, tokenizer.unique_identifiers, list(samples), data.sampling.model_dump(mode="json")],
        "blend": {"size": "count", "cached": dist.is_initialized()},
    }
    return _build_once(build, cache_dir / identity_hash(key))


@dataclass(frozen=True)
class _Part:
    """What one source gives to one split."""

    dataset: IndexedDataset
    documents: range
    weight: float


def _parts(splits: Sequence[str], sources: Sequence[tuple[IndexedDataset, float]], samples: Sequence[int]) -> list[list[_Part]]:
    """The sources of each split. One with no token there is left out (Megatron-core would count its epochs for ever)."""
    parts: list[list[_Part]] = [[], [], []]
    problems = []
    for (dataset, weight), split in zip(sources, splits, strict=True):
        total = len(dataset)
        for part, (name, documents) in zip(parts, split_documents(split, total).items(), strict=True):
            if len(split_tokens(dataset, documents)):
                part.append(_Part(dataset, documents, weight))
            elif len(sources) > 1 and split == splits[0]:
                logger.warning("%s has no document in the %s split (%d documents, split %s)", dataset.path_prefix, name, total, split)
    for part, name, count in zip(parts, SPLITS, samples, strict=True):
        if count and not part:
            totals = ", ".join(str(len(dataset)) for dataset, _ in sources)
            shares = " and ".join(repr(split) for split in dict.fromkeys(splits))
            problems.append(f"data.split {shares} leaves the {name} split without a document ({totals} in all): give it a larger share")
    if problems:
        raise BadInputError(problems)
    return parts


@dataclass(frozen=True)
class _Blendable:
    """The windows of each source in one split, and the share of the samples that each is to give."""

    windows: list[Windows]
    shares: list[float]


def _windows(parts: Sequence[_Part], count: int, split: Split, config: GPTDatasetConfig) -> _Blendable | None:
    if not count:
        return None
    shares = normalize([part.weight for part in parts])
    return _Blendable([Windows(part.dataset, part.documents, count, split, config) for part in parts], shares)


def _training(data: DataConfig, parts: _Blendable | None, count: int, config: GPTDatasetConfig, folder: Path) -> Samples | None:
    """The training samples as `data.sampling` says."""
    if parts is None:
        return None
    sampling = data.sampling
    if isinstance(sampling, LossSampling):
        return SourceDraws(parts.windows, parts.shares)
    if isinstance(sampling, TemperatureSampling):
        sizes = [windows.tokens for windows in parts.windows]
        parts = replace(parts, shares=temperature_shares(sizes, parts.shares, sampling.temperature))
    if isinstance(sampling, CurriculumSampling):
        order_windows(parts.windows, [count * share for share in parts.shares], sampling, folder)
    return _blend(parts, count, config)


def _blend(parts: _Blendable | None, count: int, config: GPTDatasetConfig) -> Samples | None:
    """`count` samples, drawn from the sources in their shares: never more than one off at any place."""
    if parts is None:
        return None
    if len(parts.windows) == 1:
        return parts.windows[0]
    if not dist.is_initialized():
        config = replace(config, path_to_cache=None)  # Megatron-core's blend asks for its rank before it writes.
    # No more than `count`, which no source can be asked to exceed: each has as many samples.
    return BlendedDataset(parts.windows, parts.shares, count, config)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class SourceDraws:
    """Samples by source and place in it, for an order that is made as training goes: sample `place * sources + source`."""

    windows: list[Windows]
    shares: list[float]

    def __len__(self) -> int:
        return len(self.windows) * max(len(windows) for windows in self.windows)

    def sample_id(self, source: int, place: int) -> int:
        return place * len(self.windows) + source

    def __getitem__(self, index: int) -> Sample:
        place, source = divmod(index, len(self.windows))
        return {"dataset_id": np.int64(source), **self.windows[source][place]}  # type: ignore[dict-item]


def _build_once(build: Callable[[Path], Splits], folder: Path) -> Splits:
    """`build(folder)` on every rank, after global rank 0 alone has filled the folder: it is complete, or it is not there. What that
    fails of, the others fail of too."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    failed = folder.with_name(f"{folder.name}.failed")
    if rank == 0:
        failed.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
    if rank == 0 and not folder.is_dir():
        try:
            _build(build, folder)
        except BaseException as error:
            with contextlib.suppress(OSError):  # on a full disk the file is empty, and there
                failed.write_text(f"{type(error).__name__}: {error}")
            raise
    while not folder.is_dir():  # not by a collective, which would time out over a long build
        if failed.exists():
            raise BadInputError(f"the order of samples could not be made on rank 0: {failed.read_text() or 'its own message says why'}")
        time.sleep(_POLL_S)
    if dist.is_initialized():
        dist.barrier()
    _check_arrays(folder)
    return build(folder)


def _build(build: Callable[[Path], Splits], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        temporary.chmod(folder.parent.stat().st_mode)
        build(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not folder.is_dir():  # else another run was faster: the same files
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_arrays(folder: Path) -> None:
    """Megatron-core opens its index files in a way that runs what a pickle among them holds: nothing but arrays may lie here."""
    for path in sorted(folder.rglob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BadInputError(f"{path} is not the array that was written ({error}): remove {folder}, and it is made anew") from None


def _fingerprint(prefix: Path) -> list[Any]:
    """What changes when the file at `prefix` is written anew."""
    stat = bin_path(prefix).stat()
    return [prefix.name, stat.st_size, stat.st_mtime_ns]


@dataclass(frozen=True)
class MockSamples:
    """Random tokens: sample i is the same at any layout, and in any process."""

    seq_length: int
    vocab_size: int
    count: int
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        ids = np.random.default_rng([*self.seed, index]).integers(0, self.vocab_size, self.seq_length + 1)
        return sample_of(ids[:-1], ids[1:], self.seq_length)


def sample_of(tokens: np.ndarray, labels: np.ndarray, seq_length: int) -> Sample:
    """One sample, filled up to `seq_length` with positions that do not count."""
    padding = (0, seq_length - len(labels))
    return {
        "tokens": np.pad(tokens.astype(np.int64), padding),
        "labels": np.pad(labels.astype(np.int64), padding),
        "loss_mask": np.pad(np.ones(len(labels), dtype=np.float32), padding),
    }


def held_out_streams(
    data: DataConfig, prefixes: Sequence[tuple[Path, float]], tokenizer: Tokenizer | MockTokenizer, split: SplitName = "test", seed: int = 0
) -> list[np.ndarray]:
    """The ids of one split, a memory-mapped array for each source that has any. Raises BadInputError where none has."""
    if data.is_mock:
        return [np.random.default_rng([seed, SPLITS.index(split)]).integers(0, tokenizer.vocab_size, _MOCK_HELD_OUT_TOKENS)]
    streams = []
    for (path, _), shares in zip(prefixes, data.splits, strict=True):
        dataset = open_indexed(path, tokenizer.vocab_size)
        streams.append(split_tokens(dataset, split_documents(shares, len(dataset))[split]))
    if not any(len(stream) for stream in streams):
        given = " and ".join(repr(shares) for shares in dict.fromkeys(data.splits))
        raise BadInputError(f"data.split {given} leaves the {split} split without a document: give it a larger share")
    return [stream for stream in streams if len(stream)]
