from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from largeformer.data.reading.sources import source_files
from largeformer.data.reading.text import DOCUMENT_BYTES, Document, Rejected, split_text
from largeformer.data.reading.units import documents
from largeformer.errors import BadInputError

KIB = 1024


def texts(content: bytes) -> list[str]:
    found = list(split_text(content, "file.txt"))
    assert all(isinstance(item, Document) for item in found)
    return [item.text for item in found if isinstance(item, Document)]


def paragraph(size: int, letter: str) -> bytes:
    """`size` bytes: lines of at most 64, then a blank one."""
    lines = (letter * 63 + "\n") * ((size - 1) // 64)
    return (lines + letter * (size - len(lines) - 2) + "\n\n").encode()


SPLITS = [
    pytest.param(b"one\n\ntwo\n", [8 + 1], id="paragraphs are packed"),
    pytest.param(b"no end of line", [14], id="last line without an end"),
    pytest.param(paragraph(20 * KIB, "a") + paragraph(20 * KIB, "b"), [20 * KIB, 20 * KIB], id="cut at the blank line"),
    pytest.param(paragraph(12 * KIB, "a") + paragraph(20 * KIB, "b") + b"c", [32 * KIB, 1], id="exactly full"),
    pytest.param(b"x" * 63 + b"\n" + b"y" * (32 * KIB - 1) + b"\n", [64, 32 * KIB], id="a long paragraph is cut after a line"),
    pytest.param(b"x" * (80 * KIB), [32 * KIB - 1, 32 * KIB - 1, 16 * KIB + 2], id="a long line is cut"),
    pytest.param("é".encode() * (20 * KIB), [32 * KIB - 2, 8 * KIB + 2], id="never inside a character, 2 bytes"),
    pytest.param("日".encode() * (20 * KIB), [32 * KIB - 2, 28 * KIB + 2], id="never inside a character, 3 bytes"),
    pytest.param(b"\r\nfirst\r\n \t\r\nsecond\r\n", [21], id="Windows line ends"),
]


@pytest.mark.parametrize(("content", "sizes"), SPLITS)
def test_documents_of_a_file_joined_are_the_file(content: bytes, sizes: list[int]) -> None:
    found = texts(content)
    assert "".join(found).encode() == content
    assert [len(text.encode()) for text in found] == sizes
    assert max(sizes) <= DOCUMENT_BYTES


def test_blank_files_have_no_documents() -> None:
    assert texts(b"") == []
    assert texts(b"\n \n\t\n") == []


def test_a_document_knows_its_line() -> None:
    content = paragraph(20 * KIB, "a") + paragraph(20 * KIB, "b") + b"\xff\n"
    found = list(split_text(content, "file.txt"))
    lines_of_a = paragraph(20 * KIB, "a").count(b"\n")
    # The bad byte lies in the second document, whose reason names the byte's own line.
    assert [(type(item), item.line) for item in found] == [(Document, 1), (Rejected, 2 * lines_of_a + 1)]
    assert isinstance(found[1], Rejected) and "0xff" in found[1].reason


ROWS = [
    pytest.param('{"text": "a\\nb", "id": 1}', "a\nb", id="other fields are ignored"),
    pytest.param('{"text": "\\ud83d\\ude00 日本"}', "😀 日本", id="escaped pair"),
    pytest.param("", None, id="blank line is skipped"),
    pytest.param('{"text": "a"', "not JSON", id="half a row"),
    pytest.param("[1]", "JSON list", id="not an object"),
    pytest.param('{"body": "a"}', "no field 'text' among ['body']", id="missing"),
    pytest.param('{"text": 3}', "JSON int", id="a number"),
    pytest.param('{"text": null}', "JSON NoneType", id="null"),
    pytest.param('{"text": " \\n"}', "blank", id="only blanks"),
    pytest.param('{"text": "\\ud83d"}', "surrogate", id="half a pair"),
    pytest.param("[" * 100_000, "not JSON", id="nested beyond reason"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize(("row", "expected"), ROWS)
def test_one_json_row_is_one_document(tmp_path: Path, row: str, expected: str | None, suffix: str) -> None:
    content = f'{{"text": "before"}}\n{row}\n{{"text": "after"}}'.encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    first, *middle, last = documents(str(path))
    assert (first, last) == (Document("before", str(path), 1), Document("after", str(path), 3))
    if expected is None:
        assert middle == []
        return
    (item,) = middle
    assert item.line == 2
    if isinstance(item, Document):
        assert item.text == expected
    else:
        assert expected in item.reason


def test_bad_utf8_in_a_row_is_rejected_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "ok"}\n{"text": "\xe9"}\n')
    assert list(documents(str(path))) == [
        Document("ok", str(path), 1),
        Rejected(str(path), 2, "not UTF-8: byte 0xe9 (invalid continuation byte)"),
    ]


def test_a_truncated_gzip_file_keeps_what_came_before(tmp_path: Path) -> None:
    rows = b"".join(json.dumps({"text": f"row {i} {i * i * 7919}"}).encode() + b"\n" for i in range(5000))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(rows)[:-2000])
    *kept, last = documents(str(path))
    assert len(kept) > 100 and all(isinstance(item, Document) for item in kept)
    assert isinstance(last, Rejected) and "gzip" in last.reason and last.line >= len(kept)


def test_folder_and_glob_are_read_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.jsonl", "a.txt", "sub/c.txt", ".hidden.txt", ".git/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "z"}' if name.endswith("jsonl") else name)
    assert [item.file for item in documents(str(tmp_path))] == [
        str(tmp_path / name) for name in ("a.txt", "a/z.jsonl", "b.txt", "sub/c.txt")
    ]
    assert source_files(f"{tmp_path}/*.txt") == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert source_files(f"{tmp_path}/**/*.txt") == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "sub/c.txt"]
    assert source_files(f"{tmp_path}/**/.git/*.txt") == [tmp_path / ".git/x.txt"], "what is hidden is named by its dot"
    assert source_files(f"{tmp_path}/**/.*.txt") == [tmp_path / ".hidden.txt"]


def test_linked_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for path in (corpus / "a.txt", corpus / "real/b.txt", elsewhere / "c.txt", elsewhere / "deep/d.txt", tmp_path / "hidden/e.txt"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    links = {
        "corpus/disk2": elsewhere,
        "corpus/disk3": elsewhere,  # the same again
        "corpus/an_alias": corpus / "real",  # what stands in the corpus keeps its name
        "corpus/real/up": corpus,
        "elsewhere/deep/round": elsewhere,
        "corpus/.hidden": tmp_path / "hidden",
        "corpus/gone": tmp_path / "gone",
        "corpus/z.txt": elsewhere / "c.txt",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    found = ["a.txt", "disk2/c.txt", "disk2/deep/d.txt", "real/b.txt", "z.txt"]
    assert source_files(str(corpus)) == [corpus / name for name in found]
    (tmp_path / "link").symlink_to(corpus)
    assert source_files(str(tmp_path / "link")) == [tmp_path / "link" / name for name in found]


def test_a_glob_reads_linked_folders_once_and_circles_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for month in ("2024-04", "2024-05"):
        (tmp_path / "crawl" / month / "deep").mkdir(parents=True)
        for name in ("1.txt", "deep/2.txt", ".3.txt"):
            (tmp_path / "crawl" / month / name).write_text(name)
    for link, target in {"crawl/0-latest": "2024-05", "crawl/2024-05/round": ".", "crawl/2024-04/again": "../2024-05"}.items():
        (tmp_path / link).symlink_to(target)
    flat = ["crawl/2024-04/1.txt", "crawl/2024-05/1.txt"]
    assert source_files(f"{tmp_path}/crawl/*/*.txt") == [tmp_path / name for name in flat]
    assert "1 files are left out that it also names by another folder" in caplog.text
    whole = sorted([*flat, "crawl/2024-04/deep/2.txt", "crawl/2024-05/deep/2.txt"])
    for pattern in ("crawl/**/*.txt", "**/*.txt", "crawl/**", "cr*/**/[12].txt", "crawl/*/**/*.txt", "**/crawl/**/*"):
        assert source_files(f"{tmp_path}/{pattern}") == [tmp_path / name for name in whole], pattern
    assert source_files(f"{tmp_path}/**/deep/*") == [tmp_path / name for name in whole if "deep" in name]


UNREADABLE = {"a folder": "corpus", "any folders": "corpus/**/*.txt", "a folder's files": "corpus/*/*.txt"}


@pytest.mark.parametrize("source", UNREADABLE.values(), ids=UNREADABLE)
def test_a_folder_that_cannot_be_read_is_bad_input(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as if it were empty."""
    for name in ("corpus/yes/a.txt", "corpus/no/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("text")
    scandir = os.scandir

    def refused(path: Any) -> Any:  # what root is never told
        if Path(path).name == "no":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(BadInputError, match=r"corpus/no cannot be read \(Permission denied\)"):
        source_files(str(tmp_path / source))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        pytest.param("absent.txt", "does not exist", id="no such file"),
        pytest.param("absent/*.txt", "does not exist", id="glob without a match"),
        pytest.param("empty.txt", "is empty", id="empty file"),
        pytest.param("folder", "folder without files", id="empty folder"),
    ],
)
def test_a_source_without_files_is_bad_input(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInputError, match=message) as caught:
        source_files(str(tmp_path / source))
    assert source in str(caught.value)


def test_python_docs_is_real_text_in_a_fixed_order() -> None:
    found = [item for item in documents("python-docs") if isinstance(item, Document)]
    files = [item.file for item in found]
    assert sum(len(item.text.encode()) for item in found) > 5_000_000
    assert files == sorted(files)
    assert not any("site-packages" in file or "/test/" in file for file in files)
    topics = "".join(item.text for item in found if item.file.endswith("pydoc_data/topics.py"))
    assert 'The "if" statement is used for conditional execution' in topics and "topics = {" not in topics
