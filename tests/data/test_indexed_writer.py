from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from largeformer.data.indexed_writer import IndexedWriter, id_dtype


@pytest.mark.parametrize("vocab_size", [2, 65_499, 65_500, 70_000])
def test_the_files_are_what_megatrons_builder_writes(tmp_path: Path, vocab_size: int) -> None:
    assert id_dtype(vocab_size) == DType.optimal_dtype(vocab_size)
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, vocab_size, size) for size in (3, 0, 1, 5000, 17)]
    with IndexedWriter(tmp_path / "ours", vocab_size, 1) as writer:
        writer.add(documents[0])
        joined = [np.append(document, 1).astype(writer.dtype) for document in documents[1:]]
        writer.add_all(np.concatenate(joined), np.array([len(document) for document in joined], dtype=np.int32))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(np.append(document, 1), [len(document) + 1])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    with IndexedWriter(tmp_path / "copy", vocab_size, 1) as writer:
        writer.copy(tmp_path / "ours", 4, sum(map(len, documents[:4])) + 4)
        writer.add(documents[4])
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"copy{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
