"""The recipe's sources, opened: the files of each, or the pair that it is; and a bounded sample of their text."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from largeformer.config.data import DataConfig, SourceConfig
from largeformer.data.reading.sources import SourceFile, pair_prefix, text_files
from largeformer.data.reading.streams import Stream
from largeformer.data.reading.text import Block, Document, Rejected, read_block
from largeformer.data.reading.units import documents, read_units, total_bytes, unit_bytes
from largeformer.errors import BadInputError

_WINDOW = 2**20
_LONG = 2**16  # a row that is longer is sampled whole; of shorter ones those that a window holds
_SHOWN_REJECTED = 10_000


@dataclass(frozen=True)
class Source:
    """One source: its pair's name in a prepare folder, and its files of text; or the prefix of the Megatron pair that it is already."""

    name: str
    path: str
    text_key: str
    files: tuple[SourceFile, ...]
    pair: Path | None = None

    @property
    def total_bytes(self) -> int:
        return total_bytes(self.files)

    def rows(self) -> list[str]:
        """One JSON row a file, with what changes when it is written anew."""
        return [json.dumps([self.name, file.name, *file.fingerprint]) for file in self.files]

    def without(self, rows: set[str]) -> Source:
        """The source without the files that `rows` names. Raises BadInputError where one of those was changed since."""
        known = {tuple(json.loads(row)[:2]) for row in rows}
        mine = dict(zip(self.rows(), self.files, strict=True))
        changed = [file.name for row, file in mine.items() if row not in rows and (self.name, file.name) in known]
        if changed:
            raise BadInputError(
                f"data.sources path {self.path!r}: {', '.join(changed[:3])} changed since it was prepared; --append adds files, "
                "it does not replace them: put new text into new files, or prepare anew with --fresh"
            )
        return replace(self, files=tuple(file for row, file in mine.items() if row not in rows))


def pair_name(index: int, source: str) -> str:
    """A file name for a source, told apart by its number."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(source).name.split(".")[0]).strip("-")
    return f"{index}-{readable or 'text'}"


def open_sources(data: DataConfig) -> list[Source]:
    """Every source. Raises UnusableError with all that have no file or hold no document."""
    problems: list[str] = []
    rejected: list[Rejected] = []
    sources: list[Source] = []
    for i, config in enumerate(data.sources):
        try:
            source = _open_source(pair_name(i, config.path), config)
        except BadInputError as error:
            problems += error.problems
            continue
        unusable = _all_rejected(source, data.max_document_bytes) if source.pair is None else None
        if unusable is not None:
            rejected += unusable
            example = f"; {len(unusable)} inputs were rejected, the first: {place(unusable[0])}" if unusable else ", only blanks"
            problems.append(f"data.sources path {config.path!r} holds nothing usable{example}")
        sources.append(source)
    if problems:
        raise UnusableError(problems, rejected)
    return sources


class UnusableError(BadInputError):
    """Sources that cannot be used, and what was rejected of them."""

    def __init__(self, problems: Sequence[str], rejected: Sequence[Rejected]) -> None:
        super().__init__(problems)
        self.rejected = list(rejected)


def place(item: Rejected) -> str:
    return f"{item.file}:{item.line}: {item.reason}"


def files_digest(sources: Sequence[Source]) -> str:
    """Changes when a file of any source is added, taken away or written anew."""
    return hashlib.sha256("\n".join(row for source in sources for row in source.rows()).encode()).hexdigest()


def sample_documents(sources: Sequence[Source], limit: int, max_bytes: int) -> Iterator[tuple[Document, int]]:
    """Documents for a tokenizer to learn from, each with the bytes of text read for it: all, where the files have `limit` bytes or
    less; else windows of about 1 MiB, evenly spread over all files."""
    files = [(file, source.text_key) for source in sources for file in source.files]
    blocks: Iterator[tuple[Block, str]]
    if sum(source.total_bytes for source in sources) <= limit:
        blocks = ((item, key) for source in sources for item, key in _all_blocks(source, max_bytes))
    else:
        blocks = _windows(files, limit, max_bytes)
    for block, key in blocks:
        size = len(block.content)
        for item in read_block(block, key, max_bytes):
            if isinstance(item, Document):
                yield item, size
                size = 0


def _open_source(name: str, config: SourceConfig) -> Source:
    pair = pair_prefix(config.path)
    if pair is None:
        files = tuple(text_files(config.path))
        if config.text_key != SourceConfig.model_fields["text_key"].default and not any(file.is_json_lines for file in files):
            raise BadInputError(
                f"data.sources path {config.path!r} has text_key {config.text_key!r}, and no file of JSON lines: name such files .jsonl "
                "(.jsonl.gz, .jsonl.zst), or leave text_key out"
            )
        return Source(name, config.path, config.text_key, files)
    halves = tuple(SourceFile(path, str(path)) for path in (pair.with_name(pair.name + ".bin"), pair.with_name(pair.name + ".idx")))
    return Source(name, config.path, config.text_key, halves, pair)


def _all_rejected(source: Source, max_bytes: int) -> list[Rejected] | None:
    """Everything in a source that holds no document; None as soon as it is seen to hold one, or too much to look at it all."""
    rejected: list[Rejected] = []
    for item in documents(source.path, source.text_key, max_bytes):
        if isinstance(item, Document) or len(rejected) == _SHOWN_REJECTED:
            return None
        rejected.append(item)
    return rejected


def _all_blocks(source: Source, max_bytes: int) -> Iterator[tuple[Block, str]]:
    for unit in read_units(source.files, unit_bytes(source.total_bytes), max_bytes):
        yield from ((item, source.text_key) for item in unit.items if isinstance(item, Block))


def _windows(files: Sequence[tuple[SourceFile, str]], limit: int, max_bytes: int) -> Iterator[tuple[Block, str]]:
    """Lines from all over the files, `limit` bytes in all, or one row where that is longer.

    What a long row has beyond its window is saved at those that follow, so that the sample stays spread.
    """
    asked = taken = 0
    read: Counter[int] = Counter()  # of each file
    for index, offset, size in _places([file for file, _ in files], limit):
        asked += size
        begin, end = max(offset, read[index] - 1), offset + size
        if taken >= asked or begin >= end:
            continue
        file, key = files[index]
        content, row, behind = _window(file, begin, end - begin, max_bytes)
        if row and taken + len(content) and taken + len(content) + len(row) > limit:
            row = b""
        read[index] = behind if row else end
        taken += len(content) + len(row)
        yield Block(file.name, 1, content + row, file.is_json_lines), key


def _places(files: Sequence[SourceFile], limit: int) -> Iterator[tuple[int, int, int]]:
    """File, offset and size of each window, `limit` bytes in all. One that begins near the end of a file goes on into those that
    follow. A place in a compressed file cannot be gone to: it stands for as much of its beginning."""
    ends = list(itertools.accumulate(file.fingerprint[0] for file in files))
    count = max(limit // _WINDOW, 1)
    beginnings: Counter[int] = Counter()
    for k in range(count):
        at = ends[-1] * k // count
        stop = min(at + _WINDOW, ends[-1])
        while at < stop:
            index = bisect.bisect_right(ends, at)
            size = min(stop, ends[index]) - at
            if files[index].compression:
                beginnings[index] += size
            else:
                yield index, at - (ends[index - 1] if index else 0), size
            at += size
    yield from ((index, 0, size) for index, size in beginnings.items())


def _window(file: SourceFile, offset: int, size: int, max_bytes: int) -> tuple[bytes, bytes, int]:
    """Whole lines of a file, from the first that begins after `offset`; a long row that begins among them and ends behind them, or the
    next row where none begins; and the place behind that row. Lines of text that are long need not be whole."""
    stream = Stream(file, offset)
    try:
        more = stream.fill(size)
        content = stream.take(size)
        begin = content.find(b"\n") + 1 if offset else 0
        end = max(begin, content.rfind(b"\n") + 1 if more else len(content))
        if not file.is_json_lines:
            begin, end = begin if begin <= _LONG else 0, end if len(content) - end <= _LONG else len(content)
            return content[begin:end], b"", stream.offset
        row = _row(stream, content[end:] if begin or not offset else None, max_bytes) if more else b""
        return content[begin:end], row, stream.offset
    finally:
        stream.close()


def _row(stream: Stream, begun: bytes | None, max_bytes: int) -> bytes:
    """The row that has `begun` before `stream`, where it is long; None: the row after the one in which `stream` stands. Else nothing,
    as where it has more than `max_bytes`."""
    if begun is None:
        _rest_of_row(stream, max_bytes)
        return _rest_of_row(stream, max_bytes) or b""
    rest = _rest_of_row(stream, max_bytes - len(begun)) if begun else None
    return begun + rest if rest is not None and len(begun) + len(rest) > _LONG else b""


def _rest_of_row(stream: Stream, max_bytes: int) -> bytes | None:
    """What is left of a row: nothing at the end of a file. None where that is more than `max_bytes`, or the file breaks off."""
    seen = 0
    while not (end := stream.buffer.find(b"\n", seen) + 1):
        seen = len(stream.buffer)
        if seen > max_bytes:
            return None
        if not stream.fill(seen + 1):
            return stream.take(seen) if stream.broken is None else None
    return stream.take(end) if end <= max_bytes else None
