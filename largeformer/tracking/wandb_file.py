"""What earlier processes of a run left in its `.wandb` files, which W&B 0.31 writes but brings no reader for.

The file is a LevelDB log ("log_format.md" of LevelDB): a header of 7 bytes, then blocks of 32 KiB that hold pieces [checksum: 4 bytes,
length: 2, type: 1, data]. A record lies in one piece (type 1) or in a first, middle ones and a last (types 2, 3, 4), and is a protobuf
message of W&B's. The checksum is not looked at: what is cut short is left out anyway.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _PIECE = 7, 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def logged_rows(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """What was logged as run `run_id` by processes before this one, in order, each with W&B's own count of rows as `_step`. `folder` holds
    the `wandb` folder."""
    for path in sorted(folder.glob(f"wandb/*run-*-{run_id}/run-{run_id}.wandb"), key=_begun):
        for item in _messages(path.read_bytes()):
            if item.HasField("history"):
                row = {(value.key or "/".join(value.nested_key)): json.loads(value.value_json) for value in item.history.item}
                yield {**row, "_step": item.history.step.num}


def _begun(path: Path) -> str:
    """`offline-run-20260102_030405-id` -> when it began; online and offline runs sort into one order."""
    return path.parent.name.removeprefix("offline-")


def _messages(data: bytes) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2

    schema: Any = wandb_internal_pb2  # generated at import: nothing that reads the source knows its names
    for piece in _pieces(data):
        try:
            yield schema.Record.FromString(piece)
        except DecodeError:
            return


def _pieces(data: bytes) -> Iterator[bytes]:
    """Whole records. What is cut short at the end, as by a killed process, is left out."""
    at, begun = _HEADER, b""
    while at + _PIECE <= len(data):
        room = _BLOCK - at % _BLOCK
        if room < _PIECE:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _PIECE
        if kind == 0 or at + length > len(data):
            return
        begun = (b"" if kind in (_WHOLE, _FIRST) else begun) + data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield begun
