"""The bytes of a file of text, plain, gzipped or zstd-compressed, without ever holding more of them than asked for."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import IO

from largeformer.data.reading.sources import SourceFile
from largeformer.errors import BadInputError

_READ = 1 << 18
_ZSTD_READ = 1 << 12  # compressed bytes at a time: what a hostile file makes of them stays bounded
_BOM = b"\xef\xbb\xbf"


class BrokenStreamError(Exception):
    """A compressed file that is cut off or damaged. What came before was handed out."""


class Stream:
    """The text of one file from byte `offset` of it on, through a buffer that is looked at before it is taken.

    offset: bytes of text already taken. A byte-order mark at the beginning of a file is not part of its text.
    """

    def __init__(self, file: SourceFile, offset: int = 0) -> None:
        content = file.content
        self._handle: IO[bytes] = io.BytesIO(content) if content is not None else file.path.open("rb")
        self._chunks = _chunks(self._handle, file.compression, offset)
        self._seen = self._at = 0
        self.buffer = bytearray()
        self.offset = offset
        self.broken: str | None = None
        if offset == 0:
            self.fill(len(_BOM))
            if self.buffer.startswith(_BOM):
                self.take(len(_BOM))

    def fill(self, size: int) -> bool:
        """Fill the buffer to `size` bytes. False where the file ends before, or breaks off: then `broken` says why."""
        while len(self.buffer) < size and self.broken is None:
            try:
                chunk = next(self._chunks, None)
            except (BrokenStreamError, EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.broken = str(error)
                break
            if chunk is None:
                return False
            self.buffer += chunk
        return len(self.buffer) >= size

    def take(self, size: int) -> bytes:
        """The first `size` bytes of the buffer."""
        taken = bytes(memoryview(self.buffer)[:size])
        del self.buffer[:size]
        self.offset += len(taken)
        return taken

    def input_bytes(self) -> int:
        """Bytes of the file itself that were read since the last call: what progress is measured in."""
        self._at, before = self._handle.tell(), self._at
        return self._at - before

    def close(self) -> None:
        self._handle.close()


def _chunks(handle: IO[bytes], compression: str | None, offset: int) -> Iterator[bytes]:
    if compression is None:
        handle.seek(offset)
        yield from iter(lambda: handle.read(_READ), b"")
        return
    for chunk in _gzip_chunks(handle) if compression == "gzip" else _zstd_chunks(handle):
        passed = min(offset, len(chunk))
        offset -= passed
        if passed < len(chunk):
            yield chunk[passed:]


def _gzip_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle, mode="rb") as stream:
        yield from iter(lambda: stream.read1(_READ), b"")


def _zstd_chunks(handle: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame, so that a file that ends inside one is noticed."""
    try:
        import zstandard
    except ImportError:
        raise BadInputError("a .zst file needs the package zstandard: pip install 'largeformer[data]'") from None
    frame = None
    while rest := handle.read(_ZSTD_READ):
        while rest:
            # As for `zstd -d --long=31`: large corpora are packed with windows of up to 2 GiB.
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                chunk = frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise BrokenStreamError(str(error)) from error
            if chunk:
                yield chunk
            rest = frame.unused_data if frame.eof else b""
            if frame.eof:
                frame = None
    if frame is not None:
        raise BrokenStreamError("the file ends before its last frame does")
