"""Is a checkpoint what was written? Sizes are looked at always, SHA-256 unless told otherwise: each rank reads its share of the files.

Where the newest is damaged the one before it is taken, and it is said which and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from largeformer.artifact import size_problems
from largeformer.checkpoint.commit import candidates, is_checkpoint
from largeformer.checkpoint.manifest import DamagedError, Digest, Files, hash_problems, read_manifest
from largeformer.errors import BadInputError
from largeformer.parallel.agreement import from_main, gather


@dataclass(frozen=True)
class Refused:
    """A damaged checkpoint, with a sentence for each thing that is wrong."""

    checkpoint: Path
    problems: list[str]

    def __str__(self) -> str:
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"{self.checkpoint.name} is damaged: {self.problems[0]}{more}"


@dataclass(frozen=True)
class Found:
    """The checkpoint to load, and those newer that were refused, newest first."""

    checkpoint: Path
    refused: list[Refused]


def find(source: Path, hashes: bool = True, below: str = "") -> Found:
    """The checkpoint that `source` means: itself, or the newest valid one of a `checkpoints`, stage or run folder. Collective.

    `below`: of which files the hashes count, such as `weights/`; sizes count of all. Raises BadInputError where nothing is there, the
    checkpoint that was named is damaged, or all are.
    """
    refused: list[Refused] = []
    for checkpoint in from_main(lambda: candidates(source)):
        problems = checkpoint_problems(checkpoint, hashes, below)
        if not problems:
            return Found(checkpoint, refused)
        refused.append(Refused(checkpoint, problems))
    hint = "name another" if is_checkpoint(source) else "none is left to go on from; --fresh starts anew"
    raise BadInputError([f"{entry}; {hint}" for entry in refused])


def checkpoint_problems(checkpoint: Path, hashes: bool = True, below: str = "") -> list[str]:
    """What is wrong with a checkpoint, alike on every rank; empty where nothing is. Collective."""
    files, problems = from_main(lambda: _look(checkpoint))
    if problems or not hashes:
        return problems
    counted = {name: digest for name, digest in files.items() if name.startswith(below)}
    return [problem for found in gather(_hash_share(checkpoint, counted)) for problem in found]


def quick_problems(checkpoint: Path) -> list[str]:
    """The same without reading the files, and on one process."""
    return _look(checkpoint)[1]


def _look(checkpoint: Path) -> tuple[Files, list[str]]:
    try:
        files = read_manifest(checkpoint)
    except DamagedError as error:
        return {}, error.problems
    return files, size_problems(checkpoint, {name: digest.size for name, digest in files.items()})


def _hash_share(checkpoint: Path, files: Mapping[str, Digest]) -> list[str]:
    """Large files first, each to the rank with the least to read so far."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    load = [0] * world_size
    mine = []
    for name, digest in sorted(files.items(), key=lambda entry: (-entry[1].size, entry[0])):
        least = load.index(min(load))
        load[least] += digest.size
        if least == rank:
            mine.append((name, digest))
    # Hashing lets other threads run; torch's number of threads is this rank's share of the cores.
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="checkpoint-verify") as pool:
        found = pool.map(lambda entry: hash_problems(checkpoint, *entry), mine)
        return [problem for problems in found for problem in problems]
