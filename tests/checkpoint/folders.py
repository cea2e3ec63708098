"""Checkpoints of a few bytes, made by the real commit, for tests of what happens to folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from largeformer.checkpoint.commit import begin, commit
from largeformer.checkpoint.manifest import Digest, Files


def write_part(temporary: Path, rank: int, step: int, validation: dict[str, Any] | None = None) -> Files:
    """What rank `rank` writes: a shard; and from rank 0 a `state.json`."""
    contents = {f"weights/rank_{rank:05d}.safetensors": f"weights of rank {rank} at {step} {'.' * 100}".encode()}
    if rank == 0:
        contents["state.json"] = json.dumps({"validation": validation or {}}).encode()
    for name, content in contents.items():
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_bytes(content)
    return {name: Digest.of(content) for name, content in contents.items()}


def save(folder: Path, step: int, **validation: float) -> Path:
    """On one process; `validation`: at this step."""
    temporary = begin(folder, step)
    return commit(temporary, write_part(temporary, 0, step, {"step": step, **validation} if validation else None))
