"""Whole tensors out of a checkpoint one at a time, and safetensors files that are written a few rows at a time.

Memory stays near the largest tensor. The safetensors library writes a file from a dictionary that holds all of it; `checkpoint/format.py`
writes tensor after tensor, each whole. Here several tensors grow side by side: one matrix of ours becomes three of theirs, or integers and
their scales.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from largeformer.artifact import write_atomically
from largeformer.checkpoint.format import DTYPES, SUFFIX, Tensors, read_headers
from largeformer.checkpoint.manifest import read_manifest
from largeformer.errors import BadInputError
from largeformer.models.hf_mapping import BESIDE

INDEX = f"model{SUFFIX}.index.json"
PART_BYTES = 16 * 2**20
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class StoredTensors:
    """Global tensors by name, each read whole when it is asked for. One process."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        """files: their names below `folder`. Raises BadInputError where one is no safetensors file."""
        self.folder = folder
        self._tensors = Tensors(folder, read_headers(folder, files))
        self._places = {place.name: place for place in self._tensors if not place.name.startswith(BESIDE)}

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> StoredTensors:
        """The weights of a checkpoint of ours, whatever layout it was saved at; of the model alone, without what was trained beside it."""
        return cls(checkpoint, [name for name in read_manifest(checkpoint) if name.startswith("weights/")])

    @classmethod
    def of_folder(cls, folder: Path) -> StoredTensors:
        """The safetensors files that a folder's index names, else its `model.safetensors`, else all that it has: another copy of the
        weights may lie beside them. Raises BadInputError where there are none."""
        names = _indexed(folder) or sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
        if not names:
            raise BadInputError(f"{folder} holds no {SUFFIX} file: name the folder that the weights were saved in")
        return cls(folder, names)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def dtype(self, name: str) -> torch.dtype:
        return self._place(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name).shape  # type: ignore[no-any-return]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU. Raises BadInputError where it is not there, or a part of it is missing."""
        return self._tensors.whole(self._place(name))

    def _place(self, name: str) -> Any:
        if name not in self._places:
            raise BadInputError(f"{self.folder} holds no {name}: it belongs to another model, or is incomplete")
        return self._places[name]


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
        self._index = folder / INDEX if count > 1 else None
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
            header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [at, at + entry.bytes]}
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
            self._file.write(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self, complete: bool) -> None:
        self._file.flush()
        if complete:
            os.fsync(self._file.fileno())
        self._file.close()
        short = [name for name, at in self._next.items() if at != self._end[name]]
        assert not complete or not short, f"{self.path.name}: not all rows came of {short}"


def _indexed(folder: Path) -> list[str]:
    index, alone = folder / INDEX, folder / f"model{SUFFIX}"
    if not index.is_file():
        return [alone.name] if alone.is_file() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInputError(f"{index} does not say which files hold the weights ({error!r}): copy the whole folder again") from None
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise BadInputError(f"{index} names {missing[0]}, which is not there: copy the whole folder")
    return names


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
