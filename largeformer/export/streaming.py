"""Safetensors read one tensor at a time and written a few rows at a time: memory stays near the largest tensor.

The safetensors library writes a file from a dictionary that holds all of it, and reads through a memory map, whose pages count as the
process's own. The format itself is small (github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header
with each tensor's dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from largeformer.artifact import write_atomically
from largeformer.errors import BadInputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PART_BYTES = 16 * 2**20
_LONGEST_HEADER = 100_000_000  # the library's own limit
_SHARDING = "DCP_SHARDING_INFO"  # PyTorch's distributed checkpoint says by this where a file's block lies in its global tensor


@dataclass(frozen=True)
class _Piece:
    """A block of a global tensor, `shape` at `offset`, from byte `start` of `path`."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: tuple[int, ...]


class StoredTensors:
    """The tensors in a folder's safetensors files: whole ones, or blocks of a distributed checkpoint.

    Raises BadInputError where the folder has none, or a file is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[str, list[_Piece]] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise BadInputError(f"{folder} holds no .safetensors file: name the folder that the weights were saved in")
        for path in files:
            for name, piece in _pieces(path):
                self._pieces.setdefault(name, []).append(piece)

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[name][0].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        ends = [[at + size for at, size in zip(piece.offset, piece.shape, strict=True)] for piece in self._pieces[name]]
        return tuple(max(end) for end in zip(*ends, strict=True))

    def sizes(self) -> dict[str, int]:
        """File -> bytes."""
        return {path.name: path.stat().st_size for path in sorted({piece.path for held in self._pieces.values() for piece in held})}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU. Raises BadInputError where it is not there, or a part of it is missing."""
        if name not in self._pieces:
            raise BadInputError(f"{self.folder} holds no {name}: it belongs to another model, or is incomplete")
        whole = torch.empty(self.shape(name), dtype=self.dtype(name))
        if sum(math.prod(piece.shape) for piece in self._pieces[name]) != whole.numel():
            raise BadInputError(f"{self.folder} holds {name} in parts that do not cover it: a file of the checkpoint is missing")
        for piece in self._pieces[name]:
            block = whole[tuple(slice(at, at + size) for at, size in zip(piece.offset, piece.shape, strict=True))]
            with piece.path.open("rb") as file:
                file.seek(piece.start)
                _fill(file, block)
        return whole


def _fill(file: BinaryIO, block: torch.Tensor) -> None:
    """Read the next bytes of `file` into `block`, a few rows at a time where they do not lie together."""
    parts = [block] if block.is_contiguous() else block.split(max(1, PART_BYTES // max(1, block[0].numel() * block.element_size())))
    for part in parts:
        held = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype)
        if held.numel() and file.readinto(memoryview(_bytes(held))) != held.numel() * held.element_size():  # type: ignore[attr-defined]
            raise BadInputError(f"{file.name} is shorter than its header says: copy it again")
        if held is not part:
            part.copy_(held)


def _bytes(tensor: torch.Tensor) -> Any:
    """uint8[...]: a contiguous tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _pieces(path: Path) -> Iterator[tuple[str, _Piece]]:
    header, start = _header(path)
    size = path.stat().st_size - start
    sharding = json.loads(header.pop("__metadata__", {}).get(_SHARDING, "{}"))
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            offset = tuple(sharding[name]["saved_offsets"]) if sharding else (0,) * len(shape)
            sound = all(isinstance(number, int) and number >= 0 for number in (*shape, *offset, first, last))
            sound = sound and last <= size and last - first == math.prod(shape) * dtype.itemsize and len(offset) == len(shape)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise BadInputError(f"{path} is broken: its header does not describe {name}; copy the file again")
        yield name, _Piece(path, start + first, dtype, shape, offset)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise BadInputError(f"{path} is no safetensors file: give the file itself, not a pointer to it")
        text = file.read(length)
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise BadInputError(f"{path} is no safetensors file: give the file itself, not a pointer to it")
    return header, 8 + length


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ShardedWriter:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, in which rows are appended to each tensor.

    Files are complete when the block ends without an error; every tensor must have got all of its rows.
    """

    def __init__(self, folder: Path, entries: Sequence[Entry], max_shard_bytes: int) -> None:
        shards = _shards(entries, max_shard_bytes)
        count = len(shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._files = [_File(folder / name, shard) for name, shard in zip(names, shards, strict=True)]
        self._file_of = {entry.name: file for file, shard in zip(self._files, shards, strict=True) for entry in shard}
        self._index = folder / "model.safetensors.index.json" if count > 1 else None
        self.total_bytes = sum(entry.bytes for entry in entries)

    def append(self, name: str, rows: torch.Tensor) -> None:
        """Write the rows that follow those already written. A tensor of any other dtype than announced is a mistake."""
        self._file_of[name].append(name, rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close(complete=error is None)
        if error is None and self._index is not None:
            weight_map = {name: file.path.name for name, file in sorted(self._file_of.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_atomically(self._index, (json.dumps(index, indent=2) + "\n").encode())


class _File:
    """One safetensors file whose header is written first, and whose tensors are filled in any order."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        places = {}
        for entry in sorted(entries, key=lambda entry: -entry.dtype.itemsize):  # so each is aligned
            header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.bytes]}
            places[entry.name] = (entry.dtype, at, at + entry.bytes)
            at += entry.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        begin = 8 + len(text)
        self._file.truncate(begin + at)
        self._next = {name: begin + first for name, (_, first, _) in places.items()}
        self._end = {name: begin + last for name, (_, _, last) in places.items()}
        self._dtype = {name: dtype for name, (dtype, _, _) in places.items()}

    def append(self, name: str, rows: torch.Tensor) -> None:
        assert rows.dtype == self._dtype[name], f"{name} was announced as {self._dtype[name]}, not {rows.dtype}"
        self._file.seek(self._next[name])
        self._next[name] += rows.numel() * rows.element_size()
        assert self._next[name] <= self._end[name], f"{name} has more rows than announced"
        if rows.numel():
            self._file.write(_bytes(rows.contiguous()))

    def close(self, complete: bool) -> None:
        self._file.flush()
        if complete:
            os.fsync(self._file.fileno())
        self._file.close()
        short = [name for name, at in self._next.items() if at != self._end[name]]
        assert not complete or not short, f"{self.path.name}: not all rows came of {short}"


def _shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """`entries` in their order, in files of at most `max_bytes` (a larger tensor has a file of its own)."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if shards[-1] and held + entry.bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += entry.bytes
    return shards
