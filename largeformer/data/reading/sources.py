"""Which files a source of the recipe is: one file, a folder, a glob, the built-in corpus, or a Megatron pair."""

from __future__ import annotations

import fnmatch
import glob
import logging
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from largeformer.errors import BadInputError

logger = logging.getLogger(__name__)
PYTHON_DOCS = "python-docs"
MOCK = "mock"
# A Python installation may lack its tests, and carries packages that are not its own.
_NOT_STANDARD_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class SourceFile:
    """A file of text and the name that it is shown by."""

    path: Path
    name: str

    @property
    def compression(self) -> str | None:
        """`gzip`, `zstd`, or None; the file's name says which."""
        return _COMPRESSED.get(self.path.suffix.lower())

    @property
    def is_json_lines(self) -> bool:
        suffixes = self.path.suffixes[:-1] if self.compression else self.path.suffixes
        return suffixes[-1:] != [] and suffixes[-1].lower() in _JSON_LINES

    @property
    def fingerprint(self) -> tuple[int, int]:
        """Size in bytes and time of last change in nanoseconds: what differs when the file was written anew."""
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    @property
    def content(self) -> bytes | None:
        """The text of the one file that is not read as it stands, pydoc's topics; None for every other."""
        if self.name != f"{PYTHON_DOCS}/{_TOPICS}":
            return None
        from pydoc_data.topics import topics  # type: ignore[import-not-found, import-untyped, unused-ignore]

        return "\n\n".join(topics[title] for title in sorted(topics)).encode("utf-8")


def text_files(source: str) -> list[SourceFile]:
    """The files of a source of text, in the order in which they are read. Raises BadInputError where there are none."""
    if source == PYTHON_DOCS:
        root = _standard_library_root()
        return [SourceFile(path, f"{PYTHON_DOCS}/{path.relative_to(root).as_posix()}") for path in source_files(source)]
    return [SourceFile(path, str(path)) for path in source_files(source)]


def source_files(source: str) -> list[Path]:
    """The files of a source in a fixed order: of a folder all that are not hidden, also in folders that it links to.

    Raises BadInputError where there are none, or a folder on the way cannot be read.
    """
    if source == PYTHON_DOCS:
        return _standard_library()
    path = Path(source).expanduser()
    if path.is_dir():
        files = _walk(path, skipped=set(), follow_links=True)
        if not files:
            raise BadInputError(f"data.sources path {source!r} is a folder without files: put text or .jsonl files there")
    elif path.exists():
        files = [path]
    else:
        files = _glob(str(path))
        if not files:
            raise BadInputError(f"data.sources path {source!r} does not exist (looked from {os.getcwd()}): give a file, a folder or a glob")
    unreadable = [str(file) for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise BadInputError(f"data.sources path {source!r}: no permission to read {', '.join(unreadable[:3])}")
    pairs = [str(file) for file in files if file.suffix in (".bin", ".idx")]
    if pairs:
        raise BadInputError(
            f"data.sources path {source!r} holds files of Megatron pairs ({', '.join(pairs[:3])}): name each pair as a source of its own"
        )
    if not any(file.stat().st_size for file in files):
        raise BadInputError(f"data.sources path {source!r} is empty (0 bytes): give a source that holds text")
    return files


def pair_prefix(source: str) -> Path | None:
    """The common name of a Megatron pair that `source` names, by its `.bin`, its `.idx` or without an ending; None for other sources.

    Raises BadInputError where one half of it is missing.
    """
    path = Path(source).expanduser()
    named = path.suffix in (".bin", ".idx") and not path.is_dir() and not glob.has_magic(source)
    prefix = path.with_suffix("") if named else path
    halves = [prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx")] if prefix.name else []
    missing = [str(half) for half in halves if not half.is_file()]
    if named and missing:
        raise BadInputError(
            f"data.sources path {source!r} is one of a Megatron pair, but {' and '.join(missing)} is not there: give both files"
        )
    return prefix if halves and not missing and (named or not path.exists()) else None


def _glob(pattern: str) -> list[Path]:
    """The files that `pattern` names, sorted. `**` is any folders that `_walk` finds: links in a circle come to an end."""
    parts = Path(pattern).parts
    cut = parts.index("**") if "**" in parts else len(parts)
    for depth in range(1, cut):
        if glob.has_magic(parts[depth]):  # folders whose content is asked for; glob itself passes over those that it cannot read
            for folder in filter(os.path.isdir, glob.iglob(os.path.join(*parts[:depth]))):
                _check_readable(folder)
    if cut == len(parts):
        found = [Path(match) for match in glob.glob(pattern) if os.path.isfile(match)]
    else:
        roots = [Path(match) for match in glob.glob(os.path.join(*parts[:cut])) if os.path.isdir(match)] if cut else [Path()]
        hidden = any(part.startswith(".") for part in parts[cut:])
        walked = ((root, file) for root in roots for file in _walk(root, skipped=set(), follow_links=True, hidden=hidden))
        found = [file for root, file in walked if _matches(file.relative_to(root).parts, parts[cut:])]
    return _once(sorted(found, key=str), pattern)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """As in a shell, a name with a dot in front is meant only where its part of the pattern has one."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (bool(parts) and not parts[0].startswith(".") and _matches(parts[1:], pattern))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _check_readable(folder: str) -> None:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise _unreadable(error) from error


def _unreadable(error: OSError) -> BadInputError:
    return BadInputError(f"data.sources: the folder {error.filename} cannot be read ({error.strerror}): make it readable, or leave it out")


def _once(files: Sequence[Path], pattern: str) -> list[Path]:
    """`files` without those of folders that are others of them by another name: a folder is read where it stands itself, else by the
    first link to it, as `_walk` does."""
    kept: dict[str, Path] = {}
    for file in files:
        folder = os.path.realpath(file.parent)
        itself = os.path.join(folder, file.name)
        if itself not in kept or os.path.abspath(file.parent) == folder:
            kept[itself] = file
    if len(kept) < len(files):
        logger.warning("data.sources path %r: %d files are left out that it also names by another folder", pattern, len(files) - len(kept))
    chosen = set(kept.values())
    return [file for file in files if file in chosen]


def _walk(root: Path, skipped: set[str], follow_links: bool, hidden: bool = False) -> list[Path]:
    """Every file below `root` in the order of its relative path, without the folders named in `skipped` and, unless wanted, what is hidden.

    A folder is read once: where it stands itself, else where the first link to it does. So links in a circle come to an end. Raises
    BadInputError where one cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from error

    found: list[Path] = []
    starts, read = [str(root)], set()
    for start in starts:  # grows by the links that are met
        for folder, subfolders, names in os.walk(start, onerror=refuse):
            if (real := os.path.realpath(folder)) in read:
                subfolders.clear()
                continue
            read.add(real)
            subfolders[:] = sorted(name for name in subfolders if (hidden or not name.startswith(".")) and name not in skipped)
            if follow_links:
                starts += [path for name in subfolders if os.path.islink(path := os.path.join(folder, name))]
            found += [Path(folder, name) for name in names if hidden or not name.startswith(".")]
    return sorted((file for file in found if file.is_file()), key=lambda file: file.relative_to(root).as_posix())


def _standard_library() -> list[Path]:
    """The standard library of the running Python, about 12 MB: its sources, and in their place among them pydoc's topics."""
    root = _standard_library_root()
    files = [file for file in _walk(root, _NOT_STANDARD_LIBRARY, follow_links=False) if file.suffix == ".py"]
    if not files:
        raise BadInputError(f"data.sources path {PYTHON_DOCS!r}: this Python has no library sources in {root}; give text of your own")
    return files


def _standard_library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
