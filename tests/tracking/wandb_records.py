"""Reads a `.wandb` file: not with the code under test, but by LevelDB's description of its log."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

Record = wandb_internal_pb2.Record


def records(path: Path) -> Iterator[Record]:
    """32 KiB blocks of [checksum, length, type, data], behind 7 bytes of header."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield Record.FromString(whole)


def runs(folder: Path, kind: str = "*run") -> list[list[Record]]:
    """The records of each process that wrote into `folder`, in the order in which they began."""
    wandb.teardown()  # `finish` may return before W&B's own process has written the file; its end waits for that
    paths = sorted(folder.glob(f"wandb/{kind}-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [[*records(path)] for path in paths]


def only_run(folder: Path, kind: str = "*run") -> list[Record]:
    (run,) = runs(folder, kind)
    return run


def history(run: list[Record]) -> list[dict[str, Any]]:
    """What was logged, W&B's own columns (underscored) left out."""
    found = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item} for r in run if r.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]


def header(run: list[Record]) -> Any:
    (found,) = (record.run for record in run if record.HasField("run"))
    return found


def config(run: list[Record]) -> dict[str, Any]:
    return {item.key: json.loads(item.value_json) for item in header(run).config.update if not item.key.startswith("_")}
