"""A source cut into units of work: which lines of which files they hold depends on the files alone.

Each file is cut after about `block_bytes` at the end of a line (text: at a blank line where one is near), and blocks are gathered
until a unit has `block_bytes`. One reader makes all units, also of compressed files, and hands them to the processes that
encode them: reading is a hundred times faster than encoding. A unit ends at a cursor, from which another reader goes on the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from largeformer.data.reading.sources import SourceFile, text_files
from largeformer.data.reading.streams import Stream
from largeformer.data.reading.text import Block, Document, Rejected, last_break, read_block, too_long

_SMALLEST, _LARGEST, _UNITS = 2**20, 2**25, 4096
_SEARCHED = 2**16
_STEP = 2**20


@dataclass(frozen=True)
class Cursor:
    """A place in a source: file number, byte of its text, line."""

    file: int = 0
    offset: int = 0
    line: int = 1


@dataclass(frozen=True)
class Unit:
    """What one process encodes at a time: blocks of text, and what the reader itself had to reject, in their order.

    input_bytes: what was read of the files for it, compressed where they are. end: where the next one begins.
    """

    number: int
    items: tuple[Block | Rejected, ...]
    input_bytes: int
    end: Cursor


def unit_bytes(total: int) -> int:
    """Bytes of a unit for a source whose files have `total`: 1 to 32 MiB, so that even a terabyte makes no more than 32,768 parts."""
    return min(max(total // _UNITS, _SMALLEST), _LARGEST)


def read_units(
    files: Sequence[SourceFile], block_bytes: int, max_bytes: int, start: Cursor | None = None, number: int = 0
) -> Iterator[Unit]:
    """The units of `files` from `start` on, numbered from `number`. Holds two blocks, or one row of `max_bytes`."""
    cursor = start or Cursor()
    items: list[Block | Rejected] = []
    held = read = 0
    for index in range(cursor.file, len(files)):
        begin = cursor if cursor.file == index else Cursor(index)
        for found, size, cursor in _read_file(files[index], begin, block_bytes, max_bytes):
            items += found
            held += sum(len(item.content) for item in found if isinstance(item, Block))
            read += size
            if held >= block_bytes or len(items) >= _UNITS:
                yield Unit(number, tuple(items), read, cursor)
                number, items, held, read = number + 1, [], 0, 0
    if items:
        yield Unit(number, tuple(items), read, Cursor(len(files)))


def documents(source: str, text_key: str = "text", max_bytes: int = 2**23) -> Iterator[Document | Rejected]:
    """Every document of a source of text, and everything that had to be rejected, in a fixed order. Holds one unit at a time."""
    files = text_files(source)
    for unit in read_units(files, unit_bytes(total_bytes(files)), max_bytes):
        for item in unit.items:
            yield from [item] if isinstance(item, Rejected) else read_block(item, text_key, max_bytes)


def total_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.fingerprint[0] for file in files)


def _read_file(file: SourceFile, begin: Cursor, block_bytes: int, max_bytes: int) -> Iterator[tuple[list[Block | Rejected], int, Cursor]]:
    """Items of one file, with the bytes that were read of the file for them and the place behind them, from where all goes on alike."""
    stream, line = Stream(file, begin.offset), begin.line
    try:
        while True:
            more = stream.fill(block_bytes)
            if not stream.buffer and stream.broken is None:
                break
            if file.is_json_lines:
                end, reason = _end_of_rows(stream, block_bytes if more else None, max_bytes)
            else:
                end, reason = _end_of_text(stream.buffer, block_bytes) if more or stream.broken else len(stream.buffer), None
            content = stream.take(end)
            found: list[Block | Rejected] = [Block(file.name, line, content, file.is_json_lines)] if content else []
            if reason is not None:
                found = [Rejected(file.name, line, reason)]
            line += content.count(b"\n")
            # Rows that lie whole before the break may be left: a longer one than a block was looked at past them.
            if stream.broken is not None and not (file.is_json_lines and b"\n" in stream.buffer):
                # Together with what was whole: who went on from between them would find another rest.
                found.append(Rejected(file.name, line, f"broken {file.compression} stream: {stream.broken}"))
                yield found, stream.input_bytes(), Cursor(begin.file + 1)
                return
            yield found, stream.input_bytes(), Cursor(begin.file, stream.offset, line)
    finally:
        stream.close()


def _end_of_rows(stream: Stream, size: int | None, max_bytes: int) -> tuple[int, str | None]:
    """Where the last whole row in the first `size` bytes ends (None: in all that is left), or the first row where it is longer; and
    what is wrong with that row, which is told by its length alone: how much was read at once is another thing for who goes on here."""
    if size is None:
        return stream.buffer.rfind(b"\n") + 1 if stream.broken else len(stream.buffer), None
    if end := stream.buffer.rfind(b"\n", 0, size) + 1:
        return end, None
    while not (end := stream.buffer.find(b"\n", size) + 1):
        if len(stream.buffer) > max_bytes:
            return _end_of_row(stream), too_long(max_bytes)
        size = len(stream.buffer)
        if not stream.fill(size + _STEP) and b"\n" not in stream.buffer:
            end = 0 if stream.broken and len(stream.buffer) <= max_bytes else len(stream.buffer)
            break
    return end, too_long(max_bytes) if end > max_bytes else None


def _end_of_row(stream: Stream) -> int:
    """The end of a row of any length: what lies before the last step of it is thrown away."""
    while (end := stream.buffer.find(b"\n") + 1) == 0:
        stream.take(len(stream.buffer))
        if not stream.fill(_STEP) and b"\n" not in stream.buffer:
            return len(stream.buffer)
    return end


def _end_of_text(buffer: bytearray, size: int) -> int:
    """Where a block of at most `size` bytes ends."""
    limit = min(size, len(buffer))
    return last_break(buffer, max(0, limit - _SEARCHED), limit) if buffer else 0
