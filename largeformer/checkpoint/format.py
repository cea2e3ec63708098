"""Blocks of global tensors <-> safetensors files.

Every rank writes its own file of the blocks that it counts, front to back, one tensor in memory at a time, hashed while it is hot. The
header says where each block lies in its global tensor, in the words of PyTorch's distributed checkpoint (`DCP_SHARDING_INFO`), whose
`HuggingFaceStorageReader` reads these files too. Any layout reads any other's: it asks for its blocks, and the overlaps are found from
the headers. Nothing is pickled, and no rank talks to another.

Format: https://huggingface.co/docs/safetensors - eight bytes of header length, a JSON header, the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from largeformer.checkpoint.manifest import DamagedError, Digest
from largeformer.errors import BadInputError

SUFFIX = ".safetensors"
DTYPES = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_SHARDING, _METADATA = "DCP_SHARDING_INFO", "__metadata__"
_CHUNK = 8 << 20  # bytes that are written and hashed at once
_LONGEST_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class Place:
    """A block of `shape` and `dtype` at `offset` of the global tensor `name`, which has `global_shape`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def overlap(self, other: Place) -> tuple[slice, ...] | None:
        """The part that both cover, as slices of the global tensor; None where there is none."""
        starts = [max(a, b) for a, b in zip(self.offset, other.offset, strict=True)]
        ends = [min(a + n, b + m) for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return tuple(slice(start, end) for start, end in zip(starts, ends, strict=True))

    def within(self, part: tuple[slice, ...]) -> tuple[slice, ...]:
        """`part`, slices of the global tensor, as slices of this block."""
        return tuple(slice(s.start - o, s.stop - o) for s, o in zip(part, self.offset, strict=True))


@dataclass(frozen=True)
class Block:
    """`tensor` is, or is to become, the part at `offset` of the global tensor `name`."""

    name: str
    tensor: torch.Tensor
    offset: tuple[int, ...]
    global_shape: tuple[int, ...]

    @property
    def place(self) -> Place:
        return Place(self.name, tuple(self.tensor.shape), self.tensor.dtype, self.offset, self.global_shape)


class ShardWriter:
    """One safetensors file of blocks that are known beforehand and come one at a time, the wider dtypes first."""

    def __init__(self, path: Path, places: Sequence[Place]) -> None:
        self._expected = iter(places)
        self._hash, self._size = hashlib.sha256(), 0
        self._file = path.open("xb", buffering=0)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-hash")
        try:
            self._write(memoryview(_header(places)))
        except OSError:
            self.abandon()
            raise

    def append(self, tensor: torch.Tensor) -> None:
        """Raises OSError where the disk refuses it."""
        place = next(self._expected)
        assert (tuple(tensor.shape), tensor.dtype) == (place.shape, place.dtype), f"{place.name} is not what the header says"
        self._write(_bytes_of(tensor.detach().cpu().contiguous()))

    def close(self) -> Digest:
        """The file is on disk when this returns. Raises OSError where it is not."""
        missing = next(self._expected, None)
        assert missing is None, f"{missing} never came"
        os.fsync(self._file.fileno())
        self.abandon()
        return Digest(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        self._hasher.shutdown()
        self._file.close()

    def _write(self, data: memoryview) -> None:
        for start in range(0, len(data), _CHUNK):
            chunk = data[start : start + _CHUNK]
            hashed = self._hasher.submit(self._hash.update, chunk)
            while chunk:
                chunk = chunk[self._file.write(chunk) :]
            # "Not needed in memory" has Linux begin to write it to the disk, while the next chunk is hashed.
            os.posix_fadvise(self._file.fileno(), self._size + start, _CHUNK, os.POSIX_FADV_DONTNEED)
            hashed.result()
        self._size += len(data)


def write_blocks(path: Path, blocks: Sequence[Block]) -> Digest:
    """Write blocks that are at hand into the file `path`."""
    widest_first = sorted(blocks, key=lambda block: -block.tensor.itemsize)
    writer = ShardWriter(path, [block.place for block in widest_first])
    for block in widest_first:
        writer.append(block.tensor)
    return writer.close()


@dataclass(frozen=True)
class Stored:
    """A block and where its bytes begin in its file."""

    place: Place
    file: Path
    begin: int


class Tensors:
    """The tensors that a set of files holds together; what the headers say is in memory, the rest is read on demand."""

    def __init__(self, folder: Path, stored: Iterable[Stored]) -> None:
        self._folder = folder
        self._stored: dict[str, list[Stored]] = {}
        for part in stored:
            self._stored.setdefault(part.place.name, []).append(part)

    def __iter__(self) -> Iterator[Place]:
        """The whole tensors, by name."""
        for name, parts in sorted(self._stored.items()):
            first = parts[0].place
            yield Place(name, first.global_shape, first.dtype, (0,) * len(first.global_shape), first.global_shape)

    def read(self, blocks: Iterable[Block]) -> None:
        """Fill the blocks' tensors in place, converting to their dtype. Raises BadInputError where the files do not cover a block."""
        for block in blocks:
            place = block.place
            parts = self._stored.get(block.name, [])
            fits = bool(parts) and parts[0].place.global_shape == block.global_shape
            overlaps = [(part, both) for part in parts if (both := part.place.overlap(place)) is not None] if fits else []
            if sum(math.prod(s.stop - s.start for s in both) for _, both in overlaps) != block.tensor.numel():
                found = f"of shape {list(parts[0].place.global_shape)}" if parts else "absent"
                raise BadInputError(
                    f"{self._folder} does not hold {block.name} of shape {list(block.global_shape)} (it is {found}): "
                    "the checkpoint belongs to another model, or is incomplete"
                )
            for part, both in overlaps:
                _copy(part, part.place.within(both), block.tensor.detach()[place.within(both)])

    def whole(self, place: Place) -> torch.Tensor:
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self.read([Block(place.name, tensor, place.offset, place.global_shape)])
        return tensor


def read_headers(folder: Path, names: Iterable[str]) -> list[Stored]:
    """What the safetensors files `names` below `folder` hold. Raises DamagedError for a file that is none."""
    return [stored for name in names for stored in _read_header(folder / name)]


def _header(places: Sequence[Place]) -> bytes:
    assert len({place.name for place in places}) == len(places), "a file would keep only the last block of a tensor"
    entries: dict[str, Any] = {}
    sharding: dict[str, Any] = {}
    end = 0
    for place in places:
        begin, end = end, end + place.nbytes
        assert begin % place.dtype.itemsize == 0, "a wider dtype comes first, so that every tensor is aligned"
        entries[place.name] = {"dtype": _CODES[place.dtype], "shape": place.shape, "data_offsets": [begin, end]}
        sharding[place.name] = {"saved_offsets": place.offset, "global_shape": place.global_shape}
    entries[_METADATA] = {"format": "pt", _SHARDING: json.dumps(sharding)}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _read_header(path: Path) -> list[Stored]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        metadata = entries.pop(_METADATA, {})
        sharding = json.loads(metadata.get(_SHARDING, "{}"))
        return [_stored(path, name, entry, sharding.get(name), 8 + length, size) for name, entry in entries.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path} is no safetensors file of this format ({type(error).__name__}: {error})") from None


def _stored(path: Path, name: str, entry: Any, sharding: Any, data: int, size: int) -> Stored:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    offset = tuple(sharding["saved_offsets"]) if sharding else (0,) * len(shape)
    whole = tuple(sharding["global_shape"]) if sharding and "global_shape" in sharding else shape
    place = Place(name, shape, DTYPES[entry["dtype"]], offset, whole)
    numbers = (begin, end, *shape, *offset, *whole)
    inside = all(isinstance(n, int) and n >= 0 for n in numbers) and end - begin == place.nbytes and data + end <= size
    if not inside or any(o + n > g for o, n, g in zip(offset, shape, whole, strict=True)):
        raise ValueError(f"{name} does not lie inside its file or its global tensor")
    return Stored(place, path, data + begin)


def _copy(stored: Stored, part: tuple[slice, ...], target: torch.Tensor) -> None:
    """Read `part` of a stored block into `target`: its rows, and of these the columns."""
    place = stored.place
    rows = part[0] if part else slice(0, 1)
    row_shape = place.shape[1:]
    whole_rows = all(s == slice(0, n) for s, n in zip(part[1:], row_shape, strict=True))
    begin, row_bytes = stored.begin, math.prod(row_shape) * place.dtype.itemsize
    if whole_rows and target.is_contiguous() and target.dtype == place.dtype and target.device.type == "cpu":
        _read_into(_bytes_of(target), stored.file, begin + rows.start * row_bytes)
        return
    step = max(1, _CHUNK // max(1, row_bytes))  # no second copy of the whole block
    for first in range(rows.start, rows.stop, step):
        held = torch.empty((min(step, rows.stop - first), *row_shape), dtype=place.dtype)
        _read_into(_bytes_of(held), stored.file, begin + first * row_bytes)
        into = target[first - rows.start : first - rows.start + len(held)] if part else target
        into.copy_(held[(slice(None), *part[1:])].reshape(into.shape))


def _read_into(view: memoryview, path: Path, begin: int) -> None:
    with path.open("rb", buffering=0) as file:
        while view:
            count = os.preadv(file.fileno(), [view], begin)
            if count == 0:
                raise DamagedError(f"{path} ends before its tensors do")
            view, begin = view[count:], begin + count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
