"""Token ids on disk: Megatron-core's indexed dataset, one `.bin`/`.idx` pair for each source, `</s>` after each document.

The `.bin` file is the ids of all documents, one after the other (uint16 for a vocabulary below 65,500, else int32); the `.idx` file
says where each begins. A split is a range of documents, so its tokens are one contiguous piece of the `.bin` file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset

from largeformer.data.indexed_writer import IndexedWriter as IndexedWriter
from largeformer.data.indexed_writer import bin_path, idx_path
from largeformer.errors import BadInputError

SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")
_CHECKED_IDS = 2**22


def open_indexed(prefix: Path, vocab_size: int) -> IndexedDataset:
    """The dataset at `prefix`, memory-mapped. Raises BadInputError where it is missing, damaged, or of another vocabulary.

    Ids are looked at in evenly spread places, 4 million at most: a data set of any size opens at once.
    """
    missing = [str(path) for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if missing:
        raise BadInputError(f"prepared data {' and '.join(missing)} missing: run prepare again with --fresh")
    _check_index(idx_path(prefix))
    size = bin_path(prefix).stat().st_size
    if size == 0:
        raise BadInputError(f"{bin_path(prefix)} holds no token: run prepare again with --fresh, with text in this source")
    dataset = IndexedDataset(str(prefix))
    stated = int(dataset.sequence_lengths.sum(dtype=np.int64)) * DType.size(dataset.index.dtype)
    if size != stated:
        raise BadInputError(f"{bin_path(prefix)} has {size} bytes, its .idx says {stated}: run prepare again with --fresh")
    ids = np.memmap(bin_path(prefix), dtype=dataset.index.dtype, mode="r")
    block = _CHECKED_IDS // 64
    looked_at = [ids[start : start + block] for start in range(0, ids.size, max(block, ids.size // 64))]
    for wrong in (max(int(part.max()) for part in looked_at), min(int(part.min()) for part in looked_at)):
        if not 0 <= wrong < vocab_size:
            raise BadInputError(
                f"{bin_path(prefix)} holds id {wrong}, tokenizer.vocab_size is {vocab_size}: run prepare again with --fresh"
            )
    return dataset


def check_tokenizer(identifiers: Mapping[str, str], recorded: Mapping[str, Any], folder: Path) -> None:
    """`recorded`: the metrics of the manifest beside the data, in `folder`; `identifiers`: the tokenizer's own, as it was opened.

    Raises BadInputError where the ids were made by another tokenizer. Data that do not say by which are taken as they are.
    """
    expected, found = recorded.get("tokenizer_sha256"), identifiers.get("sha256")
    if expected is not None and found is not None and expected != found:
        raise BadInputError(
            f"the tokenizer in {folder} (sha256 {found[:12]}...) is not the one that made the ids beside it ({expected[:12]}...): put "
            "that one back, or run prepare again with --fresh"
        )


def _check_index(path: Path) -> None:
    """The `.idx` file is one, and whole: a header of 34 bytes, then 12 bytes a sequence and 8 for each border between documents.

    Megatron-core may cut a document into several sequences, or none; here and in its GPTDataset each of them is a document.
    """
    with path.open("rb") as handle:
        header = handle.read(34)
    whole = False
    if len(header) == 34 and header.startswith(b"MMIDIDX\x00\x00"):
        version, dtype, sequences, borders = struct.unpack_from("<QBQQ", header, 9)
        sizes_agree = path.stat().st_size == 34 + 12 * sequences + 8 * borders and borders >= 1
        whole = version == 1 and dtype in (4, 8) and sizes_agree
    if not whole:
        raise BadInputError(f"{path} is damaged, or of another kind than int32 or uint16: run prepare again with --fresh")


def parse_split(split: str) -> tuple[float, float, float]:
    """Shares of train, valid and test that sum to 1. Raises BadInputError unless `split` is up to three numbers, not all zero."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not math.isfinite(share) or share < 0 for share in shares) or not sum(shares):
        raise BadInputError(f"data.split {split!r} is not three shares of train, valid and test: write for example '96,2,2'")
    train, valid, test = (share / sum(shares) for share in [*shares, 0.0, 0.0][:3])
    return train, valid, test


def split_documents(split: str, documents: int) -> dict[SplitName, range]:
    """Which of `documents` documents each split holds, as Megatron-core cuts them: in their order, at rounded borders. Where rounding
    would leave a split that has a share without a document, it gets one of its neighbour's, if there are enough."""
    ends = convert_split_vector_to_split_matrix(list(parse_split(split)))
    least = [0 if end is None else 1 for end in ends]
    borders = [0]
    for end in ends:
        borders.append(borders[-1] if end is None else round(end[1] * documents))
    if documents >= sum(least):
        for i in (1, 2):
            borders[i] = max(borders[i], borders[i - 1] + least[i - 1])
        for i in (2, 1):
            borders[i] = min(borders[i], borders[i + 1] - least[i])
    return {name: range(*borders[i : i + 2]) for i, name in enumerate(SPLITS)}


def split_tokens(dataset: IndexedDataset, documents: range) -> np.ndarray:
    """The ids of consecutive documents as one memory-mapped array, without reading them."""
    if not documents:
        return np.empty(0, dtype=dataset.index.dtype)
    start = int(dataset.index.sequence_pointers[documents.start])
    count = int(dataset.sequence_lengths[documents.start : documents.stop].sum(dtype=np.int64))
    return np.memmap(bin_path(Path(dataset.path_prefix)), dtype=dataset.index.dtype, mode="r", offset=start, shape=(count,))
