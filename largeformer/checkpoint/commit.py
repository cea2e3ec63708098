"""A checkpoint is a folder that is complete or is not there.

Ranks write into `step_N.tmp`. When all have told that their files are on disk, `checksums.json` is written, the folder is renamed to
`step_N`, and `latest` is replaced. A rank that could not write tells so instead, and every rank hears it: nobody waits for it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from largeformer.artifact import is_set_aside, sync_folder, write_atomically
from largeformer.checkpoint.manifest import Digest, write_manifest
from largeformer.errors import BadInputError
from largeformer.parallel.agreement import from_main, gather, is_main

LATEST = "latest"
TEMPORARY, REPLACED, DROPPED, DAMAGED = ".tmp", ".old", ".dropped", ".damaged"
_NAME = re.compile(r"step_(\d{8,})")

_log = logging.getLogger(__name__)


class SaveError(RuntimeError):
    """A checkpoint that could not be saved: the same on every rank. Earlier ones are as they were."""


def begin(folder: Path, step: int) -> Path:
    """The empty folder to write step `step` into. Collective. Raises SaveError where it cannot be made."""
    temporary = folder / f"step_{step:08d}{TEMPORARY}"

    def make() -> str | None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # left behind by a run that died while saving
            temporary.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return None

    problem = from_main(make)
    if problem is not None:
        raise SaveError(f"step {step} was not saved: {problem}")
    return temporary


def commit(temporary: Path, written: Mapping[str, Digest], problem: str | None = None) -> Path:
    """Give the folder its name, once every rank has `written` its files, or tells the `problem` for which it has not. Collective.

    Raises SaveError, on every rank alike, where any has a problem; the folder is gone then.
    """
    final = temporary.with_suffix("")
    told = gather((dict(written), problem))
    problems = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(told) if text is not None]
    if not problems:
        files = {name: digest for names, _ in told for name, digest in names.items()}
        problems = from_main(lambda: _commit(temporary, final, files))
    if problems:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"step {step_of(final)} was not saved: {'; '.join(problems)}")
    return final


def tidy(folder: Path) -> None:
    """Remove what a run that died while saving has left in `folder`, and put back a checkpoint that it was about to replace. By one
    process, while no other saves there."""
    for path in folder.glob(f"step_*{REPLACED}"):
        if path.with_suffix("").exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(path.with_suffix(""))
    for path in (*folder.glob(f"step_*{TEMPORARY}"), *folder.glob(f"step_*{DROPPED}")):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it for a valid one; `latest` then names the newest that is left. Returns its new
    path. By one process."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}{DAMAGED}" + (f"-{number}" if number > 1 else ""))).exists():
        number += 1
    checkpoint.rename(aside)
    found = newest(checkpoint.parent)
    if found is not None:
        point_latest_at(found)
    return aside


def point_latest_at(checkpoint: Path) -> None:
    """`latest` is for people and scripts: nothing here goes by it. So it is no failure where it cannot be written."""
    try:
        write_atomically(checkpoint.parent / LATEST, f"{checkpoint.name}\n".encode())
    except OSError as error:
        _log.warning("%s cannot be made to name %s (%s)", checkpoint.parent / LATEST, checkpoint.name, error)


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if is_checkpoint(path)), key=step_of)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`; the names tell."""
    found = committed(folder)
    return found[-1] if found else None


def candidates(source: Path) -> list[Path]:
    """The checkpoints of one training that `source` may mean, newest first: itself, or those of a `checkpoints`, stage or run folder.

    Raises BadInputError where there is none, or a run has those of several stages.
    """
    first, *others = stages_with_checkpoints(source)
    if others:
        names = [found[0].parent.parent.name for found in (first, *others)]
        raise BadInputError(f"{source} holds checkpoints of several stages ({', '.join(names)}): name one, as in {source}/{names[-1]}")
    return first


def stages_with_checkpoints(source: Path) -> list[list[Path]]:
    """All checkpoints that `source` may mean, those of each stage newest first; of a run, what was set aside is left out.

    Raises BadInputError where there is none.
    """
    if is_checkpoint(source):
        return [[source if _NAME.fullmatch(source.name) else source.absolute()]]
    own = committed(source) or committed(source / "checkpoints")
    stages = [] if own else [folder for folder in sorted(source.glob("*/checkpoints")) if not is_set_aside(folder.parent)]
    found = [checkpoints[::-1] for checkpoints in (own, *map(committed, stages)) if checkpoints]
    if not found:
        raise BadInputError(
            f"{source} holds no checkpoint: name a run, a stage, or a folder such as {source}/pretrain/checkpoints/step_00000100"
        )
    return found


def is_checkpoint(path: Path) -> bool:
    """By the name of its folder, also where that is named as `.`, from inside."""
    return _NAME.fullmatch(path.absolute().name) is not None and path.is_dir()


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.absolute().name)
    assert match is not None, f"{checkpoint} is not named as a checkpoint"
    return int(match[1])


def _commit(temporary: Path, final: Path, files: Mapping[str, Digest]) -> list[str]:
    """On rank 0. What is on disk may lose power at any line: before the second rename nothing is new, after it nothing is old."""
    replaced = final.with_name(f"{final.name}{REPLACED}")
    try:
        write_manifest(temporary, files)
        for path in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
            sync_folder(path)
        if final.exists():  # saved again, after going back to an earlier step
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        temporary.rename(final)
        sync_folder(final.parent)
    except OSError as error:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        return [f"rank 0: {error}"]
    shutil.rmtree(replaced, ignore_errors=True)
    point_latest_at(final)
    return []
