"""A checkpoint is a folder that is complete or is not there.

Ranks write into `step_N.tmp`; when all are done it is renamed to `step_N`, then `latest` is replaced.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from largeformer.artifact import sync_folder, write_atomically
from largeformer.errors import BadInputError

LATEST = "latest"
_NAME = re.compile(r"step_(\d{8})")


@contextlib.contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """The folder to write step `step` into; at the end of the block it gets its name. Collective: all ranks enter and leave."""
    final = folder / f"step_{step:08d}"
    temporary = final.with_suffix(".tmp")
    if _is_main():
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a run that died while saving
        temporary.mkdir(parents=True)
    _barrier()
    yield temporary
    for path in temporary.rglob("*"):
        sync_folder(path) if path.is_dir() else None
    _barrier()
    if _is_main():
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        write_atomically(folder / LATEST, f"{final.name}\n".encode())
    _barrier()


def committed(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder`; the names tell, `latest` is for people and scripts."""
    found = committed(folder)
    return found[-1] if found else None


def locate(source: Path) -> Path:
    """The checkpoint that `source` means: itself, or the newest of a `checkpoints`, stage or run folder.

    Raises BadInputError where there is none.
    """
    if _NAME.fullmatch(source.name) and source.is_dir():
        return source
    for folder in (source, source / "checkpoints", *sorted(source.glob("*/checkpoints"))):
        found = newest(folder)
        if found is not None:
            return found
    raise BadInputError(
        f"{source} holds no checkpoint: name a run, a stage, or a folder such as {source}/pretrain/checkpoints/step_00000100"
    )


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, f"{checkpoint} is not named as a checkpoint"
    return int(match[1])


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
