"""What a finished stage leaves behind, and where a run stands. The only reader and writer of manifest.json and status.json.

A manifest appears in a stage's folder only once the stage has finished; it names no absolute path, so a run folder may be
copied. Both files are replaced in one step: a reader sees the old one or the new one, never a half.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

from largeformer import __version__
from largeformer.errors import BadInputError

MANIFEST = "manifest.json"
STATUS = "status.json"
Status = Literal["running", "finished", "failed", "requeue"]


@dataclass(frozen=True)
class Artifact:
    """The result of one stage, in the folder `path`.

    kind: the stage that made it. identity: hash of what makes it what it is. parents: kind -> identity of what it was made from.
    metrics: JSON numbers worth keeping. versions: library -> version.
    """

    kind: str
    path: Path
    identity: str
    parents: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self) -> Artifact:
        """Declare the stage finished: write the manifest, last of all files of its folder."""
        manifest = {
            "kind": self.kind,
            "identity": self.identity,
            "parents": self.parents,
            "metrics": self.metrics,
            "versions": self.versions,
        }
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / MANIFEST, _json(manifest))
        return self

    def withdraw(self) -> None:
        """The stage counts as unfinished again."""
        (self.path / MANIFEST).unlink()

    @classmethod
    def read(cls, folder: Path) -> Artifact | None:
        """The artifact in `folder`, or None where no stage has finished. Raises BadInputError where the manifest is broken."""
        path = folder / MANIFEST
        raw = _read_json(path, "move its folder away, or restore the file")
        if raw is None:
            return None
        wanted: dict[str, type] = {"kind": str, "identity": str, "parents": dict, "metrics": dict, "versions": dict}
        wrong = [name for name, kind in wanted.items() if not isinstance(raw.get(name), kind)]
        if wrong:
            raise BadInputError(f"{path} is broken: {', '.join(wrong)} missing or not as written; move its folder away")
        return cls(path=folder, **{name: raw[name] for name in wanted})


def file_sha256(path: Path) -> str:
    """Of the whole file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_problems(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """A sentence for each file below `folder` that is missing, or has another size than it was written with."""
    problems = []
    for name, written in sizes.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError as error:
            problems.append(f"{path} is missing" if isinstance(error, FileNotFoundError) else f"{path} cannot be read ({error})")
            continue
        if size != written:
            problems.append(f"{path} has {size:,} bytes, and was written with {written:,}")
    return problems


def identity_hash(payload: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of `payload` as JSON with sorted keys: the same on every machine, whatever the order of keys."""
    canonical = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of this package, of Python, and of the installed distributions among `names`; no library is imported."""
    versions = {"largeformer": __version__, "python": platform.python_version()}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_status(folder: Path, status: Status, **fields: Any) -> None:
    """Say in `<folder>/status.json` where the run stands: what scripts read, since a launcher may swallow the exit code.

    `time` (seconds since the epoch) is added; `fields` are JSON values, for example `stage` or `error`.
    """
    assert status in get_args(Status), status
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / STATUS, _json({"status": status, "time": time.time(), **fields}))


def read_status(folder: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last, or None before the first time. Raises BadInputError where the file is broken."""
    return _read_json(folder / STATUS, "delete it")


def is_set_aside(folder: Path) -> bool:
    """Whether a stage's folder holds an earlier result that was put out of the way, such as `pretrain.old-1`."""
    return ".old-" in folder.name


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one: temporary file, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
            os.fchmod(handle.fileno(), 0o666 & ~_umask())
        commit(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def commit(temporary: Path, path: Path) -> None:
    """Give the finished file `temporary` its name `path`, so that both content and name survive a power cut. Same folder."""
    with temporary.open("rb+") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's file mode mask; mkstemp ignores it, but a shared run folder must be readable by whom its owner allows."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def _read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise BadInputError(f"{path} is broken ({error}); {remedy}") from error
    if not isinstance(raw, dict):
        raise BadInputError(f"{path} is broken (a JSON {type(raw).__name__}, not an object); {remedy}")
    return raw
