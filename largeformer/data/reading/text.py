"""Documents from blocks of text and of JSON lines.

A text file is cut at blank lines into documents of up to 32 KiB: paragraphs are packed until the next one would not fit. Its
documents, joined, are the file again, byte for byte. One JSON line is one document, its field "text". What cannot be used is
yielded as `Rejected`, with its place and the reason, and never stops the rest.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass

DOCUMENT_BYTES = 32 * 1024


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


@dataclass(frozen=True)
class Block:
    """Consecutive whole lines of one file, the first of which is number `line`."""

    file: str
    line: int
    content: bytes
    is_json_lines: bool


def read_block(block: Block, text_key: str, max_bytes: int) -> Iterator[Document | Rejected]:
    """Every document of a block, and everything that had to be rejected, in its order."""
    if block.is_json_lines:
        return _json_rows(block, text_key, max_bytes)
    return split_text(block.content, block.file, block.line)


def too_long(max_bytes: int) -> str:
    return f"longer than data.max_document_bytes {max_bytes}"


def split_text(content: bytes, name: str, first_line: int = 1) -> Iterator[Document | Rejected]:
    """Documents of up to 32 KiB: as many whole paragraphs as fit. Longer paragraphs are cut after a line, longer lines after a
    character."""
    start = 0
    while start < len(content):
        limit = start + DOCUMENT_BYTES
        end = last_break(content, start, limit) if limit < len(content) else len(content)
        document = content[start:end]
        yield from _document(document, name, first_line)
        first_line += document.count(b"\n")
        start = end


def last_break(content: bytes | bytearray, start: int, limit: int) -> int:
    """Behind the last blank line between `start` and `limit`; if there is none, behind the last line; else before the last character,
    which may not be whole."""
    end = last_line = content.rfind(b"\n", start, limit)
    while end >= 0:
        before = content.rfind(b"\n", start, end)
        if not content[max(before + 1, start) : end].strip():
            return end + 1
        end = before
    if last_line >= 0:
        return last_line + 1
    last = limit - 1
    while last > limit - 4 and content[last] & 0xC0 == 0x80:
        last -= 1
    return last


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


def _json_rows(block: Block, text_key: str, max_bytes: int) -> Iterator[Document | Rejected]:
    for number, raw in enumerate(io.BytesIO(block.content), start=block.line):
        if not raw.strip():
            continue
        text, reason = ("", too_long(max_bytes)) if len(raw) > max_bytes else _row_text(raw, text_key)
        yield Document(text, block.file, number) if reason is None else Rejected(block.file, number, reason)


def _row_text(raw: bytes, key: str) -> tuple[str, str | None]:
    """The text of one JSON row, and what is wrong with the row (None where nothing is)."""
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return "", f"not UTF-8: byte 0x{raw[error.start]:02x} ({error.reason})"
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"
    if not isinstance(row, dict):
        return "", f"a JSON {type(row).__name__}, not an object with a field {key!r}"
    if key not in row:
        return "", f"no field {key!r} among {sorted(row)[:5]}"
    text = row[key]
    if not isinstance(text, str):
        return "", f"field {key!r} is a JSON {type(text).__name__}, not a string"
    if not text.strip():
        return "", f"field {key!r} is blank"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"field {key!r} holds half a surrogate pair at character {error.start}"
    return text, None
