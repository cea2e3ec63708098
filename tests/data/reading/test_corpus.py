"""What a tokenizer learns from: a part of the text, as large as asked for and from all over it, however the text lies in files."""

from __future__ import annotations

import gzip
import json
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


def _sampled(path: Path, limit: int) -> list[str]:
    sources = open_sources(DataConfig.model_validate({"sources": [{"path": str(path)}]}))
    return [document.text for document, _ in sample_documents(sources, limit, 8 * MIB)]


def _row(number: int, size: int) -> str:
    return json.dumps({"text": f"{number:09d} ".ljust(size - 13, "x")}) + "\n"  # as many bytes as `size`


LONG_ROWS = {
    "longer than a window": [1_500_000] * 30,
    "as long as allowed": [8 * MIB] * 6,
    "some": [100_000, 2_000_000] * 20,
    "many short ones between": [*[1_000] * 3000, 3_000_000] * 6,
    "shorter than a window": [700_000] * 60,
}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("sizes", LONG_ROWS.values(), ids=LONG_ROWS.keys())
def test_long_rows_are_sampled_by_their_share(tmp_path: Path, sizes: list[int], compressed: bool) -> None:
    content = "".join(_row(number, size) for number, size in enumerate(sizes)).encode()
    path = tmp_path / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(content, compresslevel=0) if compressed else content)
    texts = _sampled(path, 16 * MIB)
    numbers = [int(text[:9]) for text in texts]
    assert all(len(text) == sizes[number] - 13 for text, number in zip(texts, numbers, strict=True)), "whole rows"
    assert numbers == sorted(set(numbers)), "in order, none twice"
    read = sum(sizes[number] for number in numbers)
    assert 7 * MIB < read <= 16 * MIB
    long = sum(size for size in sizes if size > 2**16) / sum(sizes)
    assert sum(sizes[number] for number in numbers if sizes[number] > 2**16) / read == pytest.approx(long, abs=0.25)
    if not compressed:
        assert numbers[-1] > 0.5 * len(sizes)


def test_a_row_that_is_longer_than_the_sample_is_one_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(_row(number, 3_000_000) for number in range(3)))
    assert [len(text) for text in _sampled(path, MIB // 2)] == [3_000_000 - 13]


@pytest.mark.parametrize("break_at", [8_000_000, 30_000_000], ids=["lines", "one line"])
def test_text_of_long_lines_is_sampled_in_pieces(tmp_path: Path, break_at: int) -> None:
    path = tmp_path / "long.txt"
    path.write_text("\n".join("x" * min(break_at, 16_000_000 - at) for at in range(0, 16_000_000, break_at)))
    assert sum(map(len, _sampled(path, 4 * MIB))) == pytest.approx(4 * MIB, rel=0.05)


def test_short_rows_are_those_that_windows_hold(tmp_path: Path) -> None:
    """What tokenizers learned from before long rows were read to their end."""
    path = tmp_path / "rows.jsonl"
    sizes = [100 + number * 7919 % 60_000 for number in range(300)]
    path.write_text("".join(_row(number, size) for number, size in enumerate(sizes)))
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    windows = [sum(sizes) * k // 4 for k in range(4)]
    held = [
        number
        for window in windows
        for number, start in enumerate(starts)
        if (window < start or window == start == 0) and start + sizes[number] <= window + MIB
    ]
    assert [int(text[:9]) for text in _sampled(path, 4 * MIB)] == held
