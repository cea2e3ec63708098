"""What a tokenizer learns from: a part of the text, as large as asked for and from all over it, however the text lies in files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from largeformer.config.data import DataConfig
from largeformer.data.reading.corpus import open_sources, sample_documents

MIB = 2**20


def _lines(first: int, count: int) -> bytes:
    return b"".join(b"%09d, a line of text\n" % number for number in range(first, first + count))  # 26 bytes each


def _write(folder: Path, files: int, compressed: bool) -> None:
    """5.2 MB of numbered lines in so many files."""
    count = 200_000 // files
    folder.mkdir()
    for number in range(files):
        content = _lines(number * count, count)
        path = folder / f"{number:05d}.txt"
        if compressed:
            path.with_suffix(".txt.gz").write_bytes(gzip.compress(content, compresslevel=0))
        else:
            path.write_bytes(content)


@pytest.mark.parametrize(
    ("files", "compressed"),
    [
        pytest.param(1, False, id="one large file"),
        pytest.param(7, False, id="files about as large as a window"),
        pytest.param(500, False, id="many small files"),
        pytest.param(500, True, id="many small compressed files"),
    ],
)
def test_a_sample_has_its_size_and_is_spread(tmp_path: Path, files: int, compressed: bool) -> None:
    _write(tmp_path / "text", files, compressed)
    sources = open_sources(DataConfig.model_validate({"sources": [{"path": str(tmp_path / "text")}]}))
    texts = [document.text for document, _ in sample_documents(sources, 3 * MIB, 8 * MIB)]
    numbers = sorted(int(line[:9]) for text in texts for line in text.splitlines() if len(line) == 25)
    assert 0.95 * 3 * MIB <= sum(map(len, texts)) <= 3 * MIB
    assert len(numbers) > 100_000 and len(set(numbers)) == len(numbers), "no line twice"
    for third in range(3):
        inside = [number for number in numbers if third / 3 <= number / 200_000 < (third + 1) / 3]
        assert len(inside) == pytest.approx(len(numbers) / 3, rel=0.1)


def test_a_small_corpus_is_read_whole(tmp_path: Path) -> None:
    _write(tmp_path / "text", 3, compressed=False)
    sources = open_sources(DataConfig.model_validate({"sources": [{"path": str(tmp_path / "text")}]}))
    assert sum(len(document.text) for document, _ in sample_documents(sources, 7 * 10**6, 8 * MIB)) == 199_998 * 26
