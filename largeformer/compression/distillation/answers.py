"""A teacher's answers, written down: the most probable ids of each token with their log-probabilities at the temperature of the loss.

    identity.json                         what the answers depend on: teacher, text and its order, temperature, top-k
    answers_<sample>_<unique>.safetensors   rows of whole samples: samples int64[n], ids uint32[n, s, k],
                                            log_probabilities float16 or float32[n, s, k], rest float32[n, s]: log of what the others have

A sample is known by its place in the training order, which no layout changes: another layout or micro batch reads the same files. No file
is ever written over: another student may have read where its samples are. What
lies beyond the top k is taken to be spread over the other ids as the student spreads it, so that the divergence is that over the k ids
and one outcome for all others: nothing is renormalised, and with all ids written it is the divergence over the vocabulary.
`n` samples, `s` sequence, `b` micro batch, `v` this rank's share of the padded vocabulary.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from largeformer.artifact import sync_folder, write_atomically
from largeformer.compression.distillation.loss import Answer
from largeformer.errors import BadInputError
from largeformer.models.losses import Share
from largeformer.parallel.batch import Batch

_IDENTITY, _SUFFIX = "identity.json", ".safetensors"
_BUFFERED = 64 << 20  # bytes that are written at once: what a run that is killed loses at most
_LEAST = 1.0e-30
_OPEN_FILES = 16


@dataclass(frozen=True)
class WrittenAnswer:
    """ids: int64[n, k]; log_probabilities: float32[n, k]; rest: float32[n]: of the n tokens of a micro batch."""

    ids: torch.Tensor
    log_probabilities_: torch.Tensor
    rest: torch.Tensor

    def log_probabilities(self, rows: slice, log_q: torch.Tensor, share: Share) -> torch.Tensor:
        local = self.ids[rows] - share.start
        place = torch.where((local >= 0) & (local < share.size), local, share.size)  # the others' go to a column of their own
        q = torch.cat([log_q.exp(), log_q.new_zeros(len(log_q), 1)], dim=1).scatter_(1, place, 0.0)
        log_q_rest = share.sum(q[:, :-1].sum(dim=1)).clamp_min(_LEAST).log()
        log_p = torch.cat([log_q + (self.rest[rows] - log_q_rest).unsqueeze(1), log_q.new_zeros(len(log_q), 1)], dim=1)
        return log_p.scatter_(1, place, self.log_probabilities_[rows])[:, :-1]


def most_probable(log_p: torch.Tensor, k: int, share: Share) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k most probable ids of the whole vocabulary, their log-probabilities, and the log of what all others have together.

    log_p: float32[n, v]. Returns: int64[n, k], float32[n, k], float32[n], alike on the ranks that share the vocabulary. Collective.
    """
    values, ids = log_p[:, : max(share.valid, 1)].topk(min(k, max(share.valid, 1)), dim=1)
    values, ids = _padded(values, k, float("-inf")), _padded(ids + share.start, k, 0)
    world = dist.get_world_size(share.group)
    if world > 1:
        everyones = [(torch.empty_like(values), torch.empty_like(ids)) for _ in range(world)]
        dist.all_gather([value for value, _ in everyones], values.contiguous(), group=share.group)
        dist.all_gather([index for _, index in everyones], ids.contiguous(), group=share.group)
        best, order = torch.cat([value for value, _ in everyones], dim=1).topk(k, dim=1)
        values, ids = best, torch.cat([index for _, index in everyones], dim=1).gather(1, order)
    local = ids - share.start
    place = torch.where((local >= 0) & (local < share.size), local, share.size)
    others = torch.cat([log_p.exp(), log_p.new_zeros(len(log_p), 1)], dim=1).scatter_(1, place, 0.0)[:, :-1]
    return ids, values, share.sum(others.sum(dim=1)).clamp_min(_LEAST).log()


def _padded(values: torch.Tensor, k: int, filler: float) -> torch.Tensor:
    return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=filler)


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make `folder` the place of these answers. On one rank. Raises BadInputError where it holds others."""
    path = folder / _IDENTITY
    try:
        there = json.loads(path.read_text())
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}): delete the folder, or name another as distill.offline.folder") from None
    if there is not None and there != dict(identity):
        changed = ", ".join(f"{key} was {there.get(key)}, is {value}" for key, value in identity.items() if there.get(key) != value)
        raise BadInputError(
            f"{folder} holds the answers of another teacher, text or temperature ({changed}): delete it, or name another as "
            "distill.offline.folder"
        )
    if there is None and any(folder.glob(f"*{_SUFFIX}")):
        raise BadInputError(f"{folder} holds answers without {_IDENTITY}, which says whose: delete it, or name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(identity, indent=2) + "\n").encode())
    except OSError as error:
        raise BadInputError(f"{folder} cannot be written ({error}): name another as distill.offline.folder") from None
    for unfinished in folder.glob(f"answers_*.{socket.gethostname()}-*.tmp"):
        if not Path("/proc", unfinished.stem.rpartition("-")[2]).exists():  # another run may be writing here
            unfinished.unlink()


def index(folder: Path) -> dict[int, tuple[str, int]]:
    """Where each sample's answer is: file and row. Raises BadInputError for a file that is none of ours."""
    found: dict[int, tuple[str, int]] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            with safe_open(path, "numpy") as file:
                found |= {int(sample): (path.name, row) for row, sample in enumerate(file.get_tensor("samples"))}
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"{path} cannot be read ({error}): delete it, and its samples are asked for again") from None
    return found


class AnswerWriter:
    """Gathers the answers of this rank's samples, and writes a file whenever there are enough; each is there whole or not at all."""

    def __init__(self, folder: Path, precision: str) -> None:
        self._folder, self._dtype = folder, {"fp32": np.float32, "fp16": np.float16}[precision]
        self._rows: list[dict[str, np.ndarray]] = []
        self._size = 0

    def add(self, samples: Sequence[int], ids: torch.Tensor, log_probabilities: torch.Tensor, rest: torch.Tensor) -> None:
        """ids, log_probabilities: [b, s, k]; rest: [b, s]. Raises OSError."""
        rows: dict[str, np.ndarray] = {
            "samples": np.asarray(samples, dtype=np.int64),
            # safetensors writes memory as it lies
            "ids": np.ascontiguousarray(ids.cpu().numpy(), dtype=np.uint32),
            "log_probabilities": np.ascontiguousarray(log_probabilities.cpu().numpy(), dtype=self._dtype),
            "rest": np.ascontiguousarray(rest.cpu().numpy(), dtype=np.float32),
        }
        self._rows.append(rows)
        self._size += sum(array.nbytes for array in rows.values())
        if self._size >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is gathered. Raises OSError."""
        if not self._rows:
            return
        whole = {name: np.concatenate([rows[name] for rows in self._rows]) for name in self._rows[0]}
        path = self._folder / f"answers_{whole['samples'][0]:012d}_{uuid.uuid4().hex}{_SUFFIX}"
        temporary = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
        try:
            save_file(whole, temporary)
        except SafetensorError as error:  # so it tells that a disk is full
            raise OSError(f"{path} cannot be written ({error})") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(self._folder)
        self._rows, self._size = [], 0


class AnswerReader:
    """Stands where the teacher would: reads what it said of each micro batch, in turn. where: see `index`."""

    def __init__(self, folder: Path, where: Mapping[int, tuple[str, int]]) -> None:
        self._folder, self._where = folder, where
        self._files: dict[str, Any] = {}
        self._waiting: deque[Batch] = deque()

    def accompany(self, student: Sequence[Any]) -> None:
        """Nothing: no batch needs the teacher any more."""

    def begin(self, batches: Iterable[Batch]) -> None:
        """The next step trains on `batches`."""
        self._waiting = deque(batches)

    def answer(self) -> Answer:
        """What the teacher said of the next micro batch."""
        batch = self._waiting.popleft()
        rows = [self._row(sample) for sample in batch.sample_ids]
        device = batch.tokens.device
        # The student's tokens come in the order [s, b].
        ids, values, rest = (torch.from_numpy(np.stack(arrays, axis=1)).flatten(0, 1).to(device) for arrays in zip(*rows, strict=True))
        return WrittenAnswer(ids, values, rest)

    def _row(self, sample: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        name, row = self._where[sample]
        file = self._files.pop(name, None) or safe_open(self._folder / name, "numpy")
        self._files[name] = file  # the one used longest ago comes first
        while len(self._files) > _OPEN_FILES:
            self._files.pop(next(iter(self._files)))
        ids, values, rest = (file.get_slice(part)[row] for part in ("ids", "log_probabilities", "rest"))
        return ids.astype(np.int64), values.astype(np.float32), rest
