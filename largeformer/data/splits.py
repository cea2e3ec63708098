"""From indexed files to train, valid and test samples. `s` sequence.

    IndexedDataset (.bin/.idx)      documents of one source
      -> GPTDataset                 one split of it: documents shuffled and joined, cut every s tokens, the samples shuffled
      -> BlendedDataset             the sources in their weights, where there are several

The order of samples depends on the seed, the data, s and the number of samples asked for; never on the layout. This is what
Megatron-core's own builder makes, with three differences: it needs no process group; a split in which a source has no document
is noticed, not waited for; index files on disk are complete or not there.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize

from largeformer.artifact import identity_hash
from largeformer.config.data import DataConfig
from largeformer.data.indexed import SPLITS, SplitName, bin_path, open_indexed, parse_split, split_documents, split_tokens
from largeformer.data.tokenizer import MockTokenizer, Tokenizer
from largeformer.errors import BadInputError

logger = logging.getLogger(__name__)
_MOCK_HELD_OUT_TOKENS = 8192
_POLL_S = 0.2


class Samples(Protocol):
    """What a batch is made of: `samples[i]` holds `tokens`, `labels`, `position_ids` (int64[s]) and `loss_mask` (float32[s])."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


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
    """At least `samples` samples of train, valid and test, from indexed files and their weights (or random tokens).

    Works without a process group. With one, every rank must call it: global rank 0 builds the index files below `cache_dir`, which
    all ranks must see, and the others wait. Raises BadInputError where a split that is asked for holds no document.
    """
    if mock or data.is_mock:
        random = [MockSamples(seq_length, tokenizer.vocab_size, count, (seed, i)) if count else None for i, count in enumerate(samples)]
        return Splits(*random)
    sources = [(open_indexed(path, tokenizer.vocab_size), weight) for path, weight in prefixes]
    parts = _parts(data.split, sources, samples)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=([path.name for path, _ in prefixes], [weight for _, weight in prefixes]),
        split=",".join(f"{share:.17f}" for share in parse_split(data.split)),
        tokenizer=tokenizer,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def build(folder: Path) -> Splits:
        cached = replace(config, path_to_cache=str(folder))
        return Splits(*(_blend(part, count, split, cached) for part, count, split in zip(parts, samples, Split, strict=True)))

    key = {
        "files": [_fingerprint(path) for path, _ in prefixes],
        "weights": [weight for _, weight in prefixes],
        "config": [seed, seq_length, config.split, tokenizer.unique_identifiers, list(samples)],
        "blend cached": dist.is_initialized(),
    }
    return _build_once(build, cache_dir / identity_hash(key))


@dataclass(frozen=True)
class _Part:
    """What one source gives to one split."""

    dataset: IndexedDataset
    documents: range
    weight: float


def _parts(split: str, sources: Sequence[tuple[IndexedDataset, float]], samples: Sequence[int]) -> list[list[_Part]]:
    """The sources of each split. One with no document there is left out (Megatron-core would count its epochs for ever)."""
    parts: list[list[_Part]] = [[], [], []]
    problems = []
    for dataset, weight in sources:
        total = len(dataset)
        for part, (name, documents) in zip(parts, split_documents(split, total).items(), strict=True):
            if documents:
                part.append(_Part(dataset, documents, weight))
            elif len(sources) > 1:
                logger.warning("%s has no document in the %s split (%d documents, data.split %s)", dataset.path_prefix, name, total, split)
    for part, name, count in zip(parts, SPLITS, samples, strict=True):
        if count and not part:
            totals = ", ".join(str(len(dataset)) for dataset, _ in sources)
            problems.append(f"data.split {split!r} leaves the {name} split without a document ({totals} in all): give it a larger share")
    if problems:
        raise BadInputError(problems)
    return parts


def _blend(parts: Sequence[_Part], count: int, split: Split, config: GPTDatasetConfig) -> Samples | None:
    """`count` samples of one split, drawn from its sources in their weights."""
    if not count:
        return None
    shares = normalize([part.weight for part in parts])
    wanted = [math.ceil(count * share) for share in shares]
    # The blend runs at most one sample ahead of a source's share; Megatron-core's surplus covers it.
    counts = [count] if len(parts) == 1 else [math.ceil(samples * (1 + config.mid_level_dataset_surplus)) for samples in wanted]
    datasets = [
        GPTDataset(part.dataset, Path(part.dataset.path_prefix).name, np.array(part.documents, dtype=np.int32), needed, split, config)
        for part, needed in zip(parts, counts, strict=True)
    ]
    if len(datasets) == 1:
        return datasets[0]
    if not dist.is_initialized():
        config = replace(config, path_to_cache=None)  # Megatron-core's blend asks for its rank before it writes.
    return BlendedDataset(datasets, shares, sum(wanted), config)  # type: ignore[no-any-return]


def _build_once(build: Callable[[Path], Splits], folder: Path) -> Splits:
    """`build(folder)` on every rank, after global rank 0 alone has filled the folder: it is complete, or it is not there."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0 and not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        temporary.chmod(folder.parent.stat().st_mode)
        build(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            assert folder.is_dir()  # Another run was faster: the same files.
            shutil.rmtree(temporary)
    while not folder.is_dir():  # not by a collective, which would time out over a long build
        time.sleep(_POLL_S)
    if dist.is_initialized():
        dist.barrier()
    return build(folder)


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

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = np.random.default_rng([*self.seed, index]).integers(0, self.vocab_size, self.seq_length + 1)
        return sample_of(ids[:-1], ids[1:], self.seq_length)


def sample_of(tokens: np.ndarray, labels: np.ndarray, seq_length: int) -> dict[str, torch.Tensor]:
    """One sample, filled up to `seq_length` with positions that do not count."""
    padding = (0, seq_length - len(labels))
    return {
        "tokens": torch.from_numpy(np.pad(tokens.astype(np.int64), padding)),
        "labels": torch.from_numpy(np.pad(labels.astype(np.int64), padding)),
        "loss_mask": torch.from_numpy(np.pad(np.ones(len(labels), dtype=np.float32), padding)),
        "position_ids": torch.arange(seq_length),
    }


def held_out_streams(
    data: DataConfig, prefixes: Sequence[tuple[Path, float]], tokenizer: Tokenizer | MockTokenizer, split: SplitName = "test", seed: int = 0
) -> list[np.ndarray]:
    """The ids of one split, a memory-mapped array for each source that has any. Raises BadInputError where none has."""
    if data.is_mock:
        return [np.random.default_rng([seed, SPLITS.index(split)]).integers(0, tokenizer.vocab_size, _MOCK_HELD_OUT_TOKENS)]
    streams = []
    for path, _ in prefixes:
        dataset = open_indexed(path, tokenizer.vocab_size)
        streams.append(split_tokens(dataset, split_documents(data.split, len(dataset))[split]))
    if not any(len(stream) for stream in streams):
        raise BadInputError(f"data.split {data.split!r} leaves the {split} split without a document: give it a larger share")
    return [stream for stream in streams if len(stream)]
