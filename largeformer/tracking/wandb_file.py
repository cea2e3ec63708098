"""What earlier processes of a run left in its `.wandb` files, which W&B 0.31 writes but brings no reader for; and a note of how far that
went, for when the files are gone.

The file is a LevelDB log ("log_format.md" of LevelDB): a header of 7 bytes, then blocks of 32 KiB that hold pieces [checksum: 4 bytes,
length: 2, type: 1, data]. A record lies in one piece (type 1) or in a first, middle ones and a last (types 2, 3, 4), and is a protobuf
message of W&B's. The checksum is not looked at: what is cut short is left out anyway.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from largeformer.artifact import write_atomically
from largeformer.tracking.names import STEP

NOTE = "wandb_logged.json"
_HEADER, _BLOCK, _PIECE = 7, 32768, 7
_WHOLE, _FIRST, _LAST = 1, 2, 4


def recorded(folder: Path, run_id: str) -> tuple[dict[str, int], int]:
    """The last step that earlier processes logged, of training and of validation rows; and the number of the row to come."""
    last: dict[str, int] = {}
    line = 0
    for row in logged_rows(folder, run_id):
        line = max(line, row["_step"] + 1)
        for kind, chart in (("train", "train/lr"), ("val", "val/loss")):
            if chart in row:
                last[kind] = int(row.get(STEP, 0))
    noted = _noted(folder)
    if noted.get("run_id") == run_id and noted["line"] > line:
        return noted["last"], noted["line"]
    return last, line


def note(folder: Path, run_id: str, last: Mapping[str, int], line: int) -> None:
    """Keep what `recorded` gives: files that were sent may be removed."""
    write_atomically(folder / NOTE, (json.dumps({"run_id": run_id, "line": line, "last": dict(last)}) + "\n").encode())


def _noted(folder: Path) -> dict[str, Any]:
    try:
        held = json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) and {"run_id", "line", "last"} <= held.keys() else {}


def has_ended(run_folder: Path) -> bool:
    """Whether the process that wrote the run's file has said that it was done."""
    return any(item.HasField("exit") for path in run_folder.glob("*.wandb") for item in _messages(path.read_bytes()))


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
