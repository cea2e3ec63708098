from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split

from largeformer.data.indexed import IndexedWriter, open_indexed, parse_split, split_documents, split_tokens
from largeformer.errors import BadInputError

EOD = 2
DOCUMENTS = [[5, 6, 7], [], [8], [9, 10, 11, 12]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 100) -> Path:
    with IndexedWriter(prefix, vocab_size, EOD) as writer:
        for document in documents:
            writer.add(document)
    return prefix


@pytest.mark.parametrize(("vocab_size", "code", "dtype"), [(100, 8, "<u2"), (70_000, 4, "<i4")])
def test_the_files_are_megatrons_format(tmp_path: Path, vocab_size: int, code: int, dtype: str) -> None:
    """Read here without the library: header, version, dtype, counts, then lengths (int32), byte offsets and document ends (int64)."""
    prefix = write(tmp_path / "0-a.b", DOCUMENTS, vocab_size)
    raw = (tmp_path / "0-a.b.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<QBQQ", raw, 9) == (1, code, 4, 5)
    lengths = np.frombuffer(raw, "<i4", 4, 34)
    offsets = np.frombuffer(raw, "<i8", 4, 50)
    ends = np.frombuffer(raw, "<i8", 5, 82)
    assert lengths.tolist() == [4, 1, 2, 5] and ends.tolist() == [0, 1, 2, 3, 4]
    size = np.dtype(dtype).itemsize
    assert offsets.tolist() == [0, 4 * size, 5 * size, 7 * size] and len(raw) == 82 + 40
    ids = np.frombuffer((tmp_path / "0-a.b.bin").read_bytes(), dtype)
    assert ids.tolist() == [i for document in DOCUMENTS for i in [*document, EOD]]
    dataset = open_indexed(prefix, vocab_size)
    assert [dataset[i].tolist() for i in range(4)] == [[*document, EOD] for document in DOCUMENTS]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "0-a", 100, EOD) as writer:
        writer.add([1, 2])
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_counts_are_of_what_was_written(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "0-a", 100, EOD) as writer:
        for document in DOCUMENTS:
            writer.add(document)
    assert (writer.counts.documents, writer.counts.tokens) == (4, 12)
    assert (tmp_path / "0-a.bin").stat().st_size == 12 * 2


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "no .bin": (lambda prefix: (prefix.parent / "p.bin").unlink(), "p.bin missing"),
    "no .idx": (lambda prefix: (prefix.parent / "p.idx").unlink(), "p.idx missing"),
    "half a .bin": (lambda prefix: cut(prefix.parent / "p.bin", 7), "has 7 bytes, its .idx says 24"),
    "half an .idx": (lambda prefix: cut(prefix.parent / "p.idx", 40), "p.idx is damaged"),
    "another file": (lambda prefix: (prefix.parent / "p.idx").write_bytes(b"x" * 200), "p.idx is damaged"),
    "another vocabulary": (lambda prefix: write(prefix, [[99]], 100), "holds id 99, tokenizer.vocab_size is 50"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_bad_input(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    prefix = write(tmp_path / "p", DOCUMENTS)
    assert len(open_indexed(prefix, 50)) == 4
    damage(prefix)
    with pytest.raises(BadInputError, match=message):
        open_indexed(prefix, 50)


@pytest.mark.parametrize("split", ["96,2,2", "1,1,1", "99,1,0", "100", "0,50,50", "0.7,0.2,0.1", "949,50,1"])
@pytest.mark.parametrize("documents", [0, 1, 7, 25, 1001])
def test_documents_are_split_as_megatron_splits_them(split: str, documents: int) -> None:
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    expected = [range(round(end[0] * documents), round(end[1] * documents)) if end else range(0) for end in matrix]
    parts = list(split_documents(split, documents).values())
    assert [list(part) for part in parts] == [list(part) for part in expected]
    assert [i for part in parts for i in part] == list(range(documents))


@pytest.mark.parametrize("split", ["", "a,b", "96;2;2", "1,2,3,4", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1"])
def test_a_bad_split_is_bad_input(split: str) -> None:
    with pytest.raises(BadInputError, match=r"data\.split"):
        parse_split(split)


def test_tokens_of_a_split_are_its_documents(tmp_path: Path) -> None:
    dataset = open_indexed(write(tmp_path / "p", DOCUMENTS), 50)
    assert split_tokens(dataset, range(1, 3)).tolist() == [EOD, 8, EOD]
    assert split_tokens(dataset, range(0, 4)).tolist() == [i for document in DOCUMENTS for i in [*document, EOD]]
    assert split_tokens(dataset, range(2, 2)).tolist() == []
