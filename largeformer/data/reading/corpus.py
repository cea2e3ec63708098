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
    less; else windows of 1 MiB, evenly spread over all files."""
    files = [(file, source.text_key) for source in sources for file in source.files]
    blocks: Iterator[tuple[Block, str]]
    if sum(source.total_bytes for source in sources) <= limit:
        blocks = ((item, key) for source in sources for item, key in _all_blocks(source, max_bytes))
    else:
        blocks = _windows(files, limit)
    for block, key in blocks:
        size = len(block.content)
        for item in read_block(block, key, max_bytes):
            if isinstance(item, Document):
                yield item, size
                size = 0


def _open_source(name: str, config: SourceConfig) -> Source:
    pair = pair_prefix(config.path)
    if pair is None:
        return Source(name, config.path, config.text_key, tuple(text_files(config.path)))
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


def _windows(files: Sequence[tuple[SourceFile, str]], limit: int) -> Iterator[tuple[Block, str]]:
    """A window that begins near the end of a file goes on into those that follow. A place in a compressed file cannot be gone to: it
    stands for as much of its beginning."""
    ends = list(itertools.accumulate(file.fingerprint[0] for file, _ in files))
    count = max(limit // _WINDOW, 1)
    beginnings: Counter[int] = Counter()
    for k in range(count):
        at = ends[-1] * k // count
        stop = min(at + _WINDOW, ends[-1])
        while at < stop:
            index = bisect.bisect_right(ends, at)
            file, key = files[index]
            size = min(stop, ends[index]) - at
            if file.compression:
                beginnings[index] += size
            else:
                yield _window(file, at - (ends[index - 1] if index else 0), size), key
            at += size
    yield from ((_window(files[index][0], 0, size), files[index][1]) for index, size in beginnings.items())


def _window(file: SourceFile, offset: int, size: int) -> Block:
    """Whole lines of a file, from the first that begins after `offset`."""
    stream = Stream(file, offset)
    try:
        more = stream.fill(size)
        content = stream.take(size)
    finally:
        stream.close()
    begin = content.find(b"\n") + 1 if offset else 0
    end = content.rfind(b"\n") + 1 if more else len(content)
    return Block(file.name, 1, content[begin : max(begin, end)], file.is_json_lines)
