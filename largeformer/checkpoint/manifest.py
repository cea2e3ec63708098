"""`checksums.json`: the files that make up a checkpoint, with the size and the SHA-256 of each. A folder without it is no checkpoint.

Nothing that the file says is believed before it is checked: a name must stay inside the folder, also through symbolic links.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from largeformer.artifact import write_atomically
from largeformer.errors import BadInputError

MANIFEST = "checksums.json"
FORMAT = 1


@dataclass(frozen=True)
class Digest:
    """`size` in bytes; `sha256` as 64 hex digits."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Digest:
        return cls(len(content), hashlib.sha256(content).hexdigest())


Files = dict[str, Digest]
"""Path below the checkpoint, with forward slashes -> what the file must be."""


class DamagedError(BadInputError):
    """A checkpoint that is not what was written."""


def write_manifest(folder: Path, files: Mapping[str, Digest]) -> None:
    record = {"format": FORMAT, "files": {name: asdict(digest) for name, digest in sorted(files.items())}}
    write_atomically(folder / MANIFEST, (json.dumps(record, indent=1) + "\n").encode())


def checksum(folder: Path) -> str:
    """16 hex digits that stand for all files of a checkpoint. Raises OSError."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()[:16]


def read_manifest(folder: Path) -> Files:
    """Raises DamagedError where the file is missing, broken, or names something outside `folder`."""
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: the checkpoint was never finished, or files of it were lost") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("files"), dict):
        raise DamagedError(f"{path} is not a list of files of format {FORMAT}: it was changed, or written by another version")
    return {name: _digest(folder, name, entry) for name, entry in record["files"].items()}


def hash_problems(folder: Path, name: str, digest: Digest) -> list[str]:
    """The sentence about a file whose contents have changed; reads all of it."""
    path = folder / name
    try:
        with path.open("rb", buffering=0) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{path} cannot be read ({error})"]
    return (
        [] if found == digest.sha256 else [f"{path} is not what was written: its SHA-256 is {found[:12]}..., not {digest.sha256[:12]}..."]
    )


def _digest(folder: Path, name: str, entry: Any) -> Digest:
    pure = PurePosixPath(name)
    inside = bool(name) and not pure.is_absolute() and ".." not in pure.parts and "\0" not in name
    if not inside or not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise DamagedError(f"{folder / MANIFEST} names {name!r}, which lies outside its folder: do not trust this checkpoint")
    if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or not isinstance(entry.get("sha256"), str):
        raise DamagedError(f"{folder / MANIFEST} has no size and SHA-256 for {name}: it was changed")
    return Digest(entry["size"], entry["sha256"])
