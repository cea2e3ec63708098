from __future__ import annotations

import os
import struct
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.blended_megatron_dataset_config import convert_split_vector_to_split_matrix, parse_and_normalize_split
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from largeformer.data.indexed import IndexedWriter, check_tokenizer, open_indexed, parse_split, split_documents, split_tokens
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


def megatrons(prefix: Path, documents: list[list[int]], dtype: type[np.integer], sequences: int = 1) -> Path:
    """Written by the library alone, each document in so many sequences."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        parts = [part.tolist() for part in np.array_split(np.array(document, dtype=np.int64), sequences)]
        builder.add_document([i for part in parts for i in part], [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sequences", [1, 3], ids=["a sequence a document", "three"])
def test_what_megatron_writes_is_read(tmp_path: Path, dtype: type[np.integer], sequences: int) -> None:
    """Empty documents too."""
    dataset = open_indexed(megatrons(tmp_path / "p", DOCUMENTS, dtype, sequences), 50)
    assert len(dataset) == sequences * len(DOCUMENTS) and len(dataset.document_indices) == len(DOCUMENTS) + 1
    assert split_tokens(dataset, range(len(dataset))).tolist() == [i for document in DOCUMENTS for i in document]


def test_documents_without_a_sequence_are_read_over(tmp_path: Path) -> None:
    """As Megatron writes a blank row."""
    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=np.uint16)
    for document in ([], [5, 6], [], [], [7]):
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(tmp_path / "p.idx"))
    dataset = open_indexed(tmp_path / "p", 50)
    assert len(dataset) == len(IndexedDataset(str(tmp_path / "p"))) == 2
    assert split_tokens(dataset, range(2)).tolist() == [5, 6, 7]


@pytest.mark.parametrize("vocab_size", [100, 70_000], ids=["uint16", "int32"])
def test_megatron_reads_what_is_written(tmp_path: Path, vocab_size: int) -> None:
    """Whole documents, and parts of them, mapped and from the file."""
    prefix = write(tmp_path / "p", DOCUMENTS, vocab_size)
    for mapped in (True, False):
        theirs = IndexedDataset(str(prefix), mmap=mapped)
        assert [theirs[i].tolist() for i in range(len(theirs))] == [[*document, EOD] for document in DOCUMENTS]
        assert theirs.get(3, offset=1, length=2).tolist() == [10, 11]
        assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("recorded", "refused"),
    [
        pytest.param({"tokenizer_sha256": "a" * 64}, False, id="the same"),
        pytest.param({}, False, id="data that do not say"),
        pytest.param({"tokenizer_sha256": "b" * 64}, True, id="another"),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_the_data(recorded: dict[str, str], refused: bool) -> None:
    with pytest.raises(BadInputError, match="is not the one that made the ids") if refused else nullcontext():
        check_tokenizer({"class": "Tokenizer", "sha256": "a" * 64}, recorded, Path("prepare"))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "no .bin": (lambda prefix: (prefix.parent / "p.bin").unlink(), "p.bin missing"),
    "no .idx": (lambda prefix: (prefix.parent / "p.idx").unlink(), "p.idx missing"),
    "half a .bin": (lambda prefix: cut(prefix.parent / "p.bin", 7), "has 7 bytes, its .idx says 24"),
    "half an .idx": (lambda prefix: cut(prefix.parent / "p.idx", 40), "p.idx is damaged"),
    "another file": (lambda prefix: (prefix.parent / "p.idx").write_bytes(b"x" * 200), "p.idx is damaged"),
    "an empty .bin": (lambda prefix: cut(prefix.parent / "p.bin", 0), "p.bin holds no token"),
    "int64": (lambda prefix: megatrons(prefix, [[1]], np.int64), "of another kind than int32 or uint16"),
    "negative ids": (lambda prefix: megatrons(prefix, [[5, -3]], np.int32), "holds id -3"),
    "another vocabulary": (lambda prefix: write(prefix, [[99]], 100), "holds id 99, tokenizer.vocab_size is 50"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_bad_input(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    prefix = write(tmp_path / "p", DOCUMENTS)
    assert len(open_indexed(prefix, 50)) == 4
    damage(prefix)
    with pytest.raises(BadInputError, match=message):
        open_indexed(prefix, 50)


@pytest.mark.parametrize("split", ["96,2,2", "1,1,1", "99,1,0", "100", "0,50,50", "0.7,0.2,0.1", "940,50,10"])
@pytest.mark.parametrize("documents", [0, 1, 75, 400, 1001])
def test_documents_are_split_as_megatron_splits_them(split: str, documents: int) -> None:
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    expected = [range(round(end[0] * documents), round(end[1] * documents)) if end else range(0) for end in matrix]
    parts = list(split_documents(split, documents).values())
    assert [list(part) for part in parts] == [list(part) for part in expected]
    assert [i for part in parts for i in part] == list(range(documents))


@pytest.mark.parametrize(
    ("split", "documents", "sizes"),
    [
        ("96,2,2", 36, [34, 1, 1]),
        ("96,2,2", 3, [1, 1, 1]),
        ("96,2,2", 2, [2, 0, 0]),
        ("99,1,0", 7, [6, 1, 0]),
        ("99,0,1", 7, [6, 0, 1]),
        ("1,98,1", 5, [1, 3, 1]),
        ("0,1,99", 4, [0, 1, 3]),
    ],
)
def test_few_documents_leave_no_split_empty(split: str, documents: int, sizes: list[int]) -> None:
    parts = list(split_documents(split, documents).values())
    assert [len(part) for part in parts] == sizes
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
