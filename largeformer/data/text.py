"""Documents from text files, JSON lines, folders, globs and the built-in corpus, one at a time.

A text file is cut at blank lines into documents of up to 32 KiB: paragraphs are packed until the next one would not fit. Its
documents, joined, are the file again, byte for byte. One JSON line is one document, its field "text". What cannot be used is
yielded as `Rejected`, with its place and the reason, and never stops the rest.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from largeformer.errors import BadInputError

DOCUMENT_BYTES = 32 * 1024
ByteStream = IO[bytes] | gzip.GzipFile
PYTHON_DOCS = "python-docs"
MOCK = "mock"
# A Python installation may lack its tests, and carries packages that are not its own.
_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """A piece of text and where it came from; `line` counts from 1."""

    text: str
    file: str
    line: int


@dataclass(frozen=True)
class Rejected:
    """An input that could not be used, and why."""

    file: str
    line: int
    reason: str


def source_files(source: str) -> list[Path]:
    """The files of a source in a fixed order: of a folder all that are not hidden. Raises BadInputError where there are none."""
    if source == PYTHON_DOCS:
        return _standard_library()
    path = Path(source).expanduser()
    if path.is_dir():
        files = _walk(path, skipped=set())
        if not files:
            raise BadInputError(f"data.sources path {source!r} is a folder without files: put text or .jsonl files there")
    elif path.exists():
        files = [path]
    else:
        files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(match)]
        if not files:
            raise BadInputError(f"data.sources path {source!r} does not exist (looked from {os.getcwd()}): give a file, a folder or a glob")
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise BadInputError(f"data.sources path {source!r}: no permission to read {', '.join(unreadable[:3])}")
    if not any(file.stat().st_size for file in files):
        raise BadInputError(f"data.sources path {source!r} is empty (0 bytes): give a source that holds text")
    return files


def documents(source: str) -> Iterator[Document | Rejected]:
    """Every document of a source, and everything that had to be rejected, in a fixed order. Holds one document at a time."""
    if source == PYTHON_DOCS:
        yield from _python_docs()
        return
    for path in source_files(source):
        yield from read_file(path)


def read_file(path: Path, name: str | None = None) -> Iterator[Document | Rejected]:
    """The documents of one file: JSON lines where its name says so, else text; either may be gzipped. `name` is shown for it."""
    shown = name or str(path)
    suffixes = path.suffixes[:-1] if path.suffix == ".gz" else path.suffixes
    is_json_lines = suffixes[-1:] == [".jsonl"]
    line = 0
    try:
        with _open(path) as handle:
            for item in _json_rows(handle, shown) if is_json_lines else split_text(handle, shown):
                line = item.line
                yield item
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Rejected(shown, line + 1, f"broken gzip stream: {error}")


def split_text(handle: ByteStream, name: str) -> Iterator[Document | Rejected]:
    """Documents of up to 32 KiB: as many whole paragraphs as fit."""
    document, first_line = bytearray(), 1
    for paragraph in _paragraphs(handle):
        if len(document) + len(paragraph) > DOCUMENT_BYTES:
            yield from _document(bytes(document), name, first_line)
            first_line += document.count(b"\n")
            document.clear()
        document += paragraph
    yield from _document(bytes(document), name, first_line)


def _paragraphs(handle: ByteStream) -> Iterator[bytes]:
    """Lines up to and with a blank one; a paragraph above 32 KiB is cut after a line, and a line above it after a character."""
    paragraph = bytearray()
    for line in _lines(handle):
        if len(paragraph) + len(line) > DOCUMENT_BYTES:
            yield bytes(paragraph)
            paragraph.clear()
        paragraph += line
        if not line.strip():
            yield bytes(paragraph)
            paragraph.clear()
    yield bytes(paragraph)


def _document(content: bytes, name: str, line: int) -> Iterator[Document | Rejected]:
    """One document, or why it is none; nothing where it is blank."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        bad_line = line + content.count(b"\n", 0, error.start)
        yield Rejected(name, bad_line, f"not UTF-8: byte 0x{content[error.start]:02x} ({error.reason})")
        return
    if text.strip():
        yield Document(text, name, line)


def _lines(handle: ByteStream) -> Iterator[bytes]:
    """Lines with their ends, in pieces of at most 32 KiB, never cut inside a character: a file of one line needs no more memory."""
    rest = b""
    while piece := rest + handle.readline(DOCUMENT_BYTES - len(rest)):
        rest = b""
        if len(piece) == DOCUMENT_BYTES and not piece.endswith(b"\n"):
            last = len(piece) - 1
            while last > len(piece) - 4 and piece[last] & 0xC0 == 0x80:
                last -= 1
            piece, rest = piece[:last], piece[last:]
        yield piece


def _json_rows(handle: ByteStream, name: str) -> Iterator[Document | Rejected]:
    for number, raw in enumerate(handle, start=1):
        if not raw.strip():
            continue
        text, reason = _row_text(raw)
        yield Document(text, name, number) if reason is None else Rejected(name, number, reason)


def _row_text(raw: bytes) -> tuple[str, str | None]:
    """The text of one JSON row, and what is wrong with the row (None where nothing is)."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{raw[error.start]:02x} ({error.reason})"
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"
    if not isinstance(row, dict):
        return "", f"a JSON {type(row).__name__}, not an object with a field 'text'"
    if "text" not in row:
        return "", f"no field 'text' among {sorted(row)[:5]}"
    text = row["text"]
    if not isinstance(text, str):
        return "", f"field 'text' is a JSON {type(text).__name__}, not a string"
    if not text.strip():
        return "", "field 'text' is blank"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"field 'text' holds half a surrogate pair at character {error.start}"
    return text, None


def _open(path: Path) -> ByteStream:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _walk(root: Path, skipped: set[str]) -> list[Path]:
    """Every file below `root` in the order of its relative path, without hidden files and the folders named in `skipped`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in skipped]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, _NOT_STANDARD_LIBRARY) if file.suffix == ".py"]
    if not files:
        raise BadInputError(f"data.sources path {PYTHON_DOCS!r}: this Python has no library sources in {root}; give text of your own")
    return files


def _python_docs() -> Iterator[Document | Rejected]:
    """The standard library of the running Python, about 12 MB: its sources, and in their place among them pydoc's topics as text."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in _standard_library():
        name = file.relative_to(root).as_posix()
        if name != _TOPICS:
            yield from read_file(file, f"{PYTHON_DOCS}/{name}")
            continue
        from pydoc_data.topics import topics  # type: ignore[import-not-found, import-untyped, unused-ignore]

        text = "\n\n".join(topics[title] for title in sorted(topics))
        yield from split_text(io.BytesIO(text.encode("utf-8")), f"{PYTHON_DOCS}/{name}")
