"""One process at a time at work on a folder."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
_POLL_S = 0.5


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Hold a lock beside `folder`, whatever becomes of that itself; another process that is `doing` the same is waited for, and that is
    said. Where the file system has no locks nothing is held."""
    path = folder.with_name(f".{folder.name}.lock")
    handle = _locked(path, doing)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)
            handle.close()


def _locked(path: Path, doing: str) -> IO[str] | None:
    waiting = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = path.open("a")
        except OSError:  # whoever writes there next says so
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                print(f"another process is {doing}: waiting for it", flush=True)
            waiting = True
            handle.close()
            time.sleep(_POLL_S)
            continue
        except OSError as error:
            logger.warning("%s cannot be locked (%s): let no other process be %s meanwhile", path, error.strerror, doing)
            handle.close()
            return None
        if _is_at(path, handle):
            return handle
        handle.close()  # of one who has removed it since


def _is_at(path: Path, handle: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False
