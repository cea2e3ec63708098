"""When checkpoints are written, and what becomes of the older ones.

A save is synchronous, or staged: the state is copied into buffers of this rank's own, written from there by a thread behind the training,
and committed at the end of a later step, at which every rank's thread is through. At most one is under way.

A checkpoint that cannot be written (full disk) costs the run nothing but the checkpoint: all ranks hear of it, it is told, and the next one
is tried in its turn. Only a run that would end without its last state fails.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from largeformer.checkpoint.commit import SaveError, begin, commit
from largeformer.checkpoint.format import Place
from largeformer.checkpoint.manifest import Files
from largeformer.checkpoint.retention import Policy, drop_old
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.config.schema import Recipe
from largeformer.models.shards import Shard
from largeformer.parallel.agreement import is_main
from largeformer.tracking.tracker import Tracker
from largeformer.training.checkpointing import CONFIG, STATE, Contents, TrainingState, contents_of, first_state, write_contents
from largeformer.training.engine import Engine
from largeformer.training.state import WEIGHTS, weight_blocks

_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, engine: Engine, state: TrainingState, config_yaml: str) -> Path:
    """Write and commit a checkpoint under `folder`; collective. Returns its path. Raises SaveError, on every rank alike."""
    temporary = begin(folder, state.progress.step)
    written, problem = write_contents(temporary, contents_of(engine, state, config_yaml), engine.state.tensors())
    return commit(temporary, written, problem)


def save_weights(folder: Path, shards: Sequence[Shard], config_yaml: str) -> Path:
    """Commit the weights alone as the checkpoint of step 0 under `folder`: what a stage leaves that changes a model without training it.
    Collective. Returns its path. Raises SaveError, on every rank alike."""
    blocks = {shard.key: block for shard in shards if shard.main for block in weight_blocks([shard])}
    return save_tensors(folder, [block.place for block in blocks.values()], lambda name: blocks[name].tensor, config_yaml)


def save_tensors(folder: Path, places: Sequence[Place], make: Callable[[str], torch.Tensor], config_yaml: str) -> Path:
    """The same for tensors, or blocks, that this rank and no other makes, each by its name when it is written. Collective. Returns the
    checkpoint's path. Raises SaveError, on every rank alike."""
    widest_first = sorted(places, key=lambda place: -place.dtype.itemsize)
    texts = {STATE: first_state(), CONFIG: config_yaml.encode()} if is_main() else {}
    contents = Contents(dist.get_rank(), {WEIGHTS: widest_first}, [], texts)
    temporary = begin(folder, 0)
    return commit(temporary, *write_contents(temporary, contents, ((WEIGHTS, make(place.name)) for place in widest_first)))


def retention_policy(recipe: Recipe) -> Policy:
    """By the metric of early stopping where there is any, else by the validation loss."""
    settings, stopping = recipe.checkpoint, recipe.train.early_stopping
    judged = {"metric": stopping.metric, "mode": stopping.mode} if stopping is not None else {}
    return Policy(settings.keep_last, settings.keep_every, settings.keep_best, **judged)


@dataclass(frozen=True)
class _UnderWay:
    step: int
    temporary: Path
    writing: Future[tuple[Files, str | None]]
    blocked_s: float
    started: float


class Checkpoints:
    """The checkpoints of one run, under `folder`. Every method is collective, and tells the tracker what became of a save."""

    def __init__(
        self, folder: Path, engine: Engine, tracker: Tracker, config_yaml: str, settings: CheckpointConfig, policy: Policy
    ) -> None:
        self._folder, self._engine, self._tracker, self._config_yaml, self._policy = folder, engine, tracker, config_yaml, policy
        self._staging = Staging() if settings.async_save else None
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: _UnderWay | None = None
        self._failure: SaveError | None = None

    def save(self, state: TrainingState) -> None:
        """Begin a checkpoint; without staging, also finish it. One that fails is told, and training goes on."""
        self._complete()
        step, started = state.progress.step, time.monotonic()
        try:
            temporary = begin(self._folder, step)
            if self._staging is None:
                contents = contents_of(self._engine, state, self._config_yaml)
                written, problem = write_contents(temporary, contents, self._engine.state.tensors())
                self._commit(step, temporary, written, problem, started, time.monotonic() - started)
                return
        except SaveError as error:
            self._tell_failure(step, error)
            return
        contents = contents_of(self._engine, state, self._config_yaml)
        staged = self._staging.hold(self._engine.state.tensors())
        writing = self._behind.submit(write_contents, temporary, contents, staged)
        self._under_way = _UnderWay(step, temporary, writing, time.monotonic() - started, started)

    def poll(self) -> None:
        """Commit what was written meanwhile, once every rank is through; the ranks ask each other only while a save is under way."""
        if self._under_way is not None and self._engine.groups.largest(not self._under_way.writing.done()) == 0.0:
            self._complete()

    def finish(self, *, last_counts: bool = True) -> None:
        """Wait for what is under way. Raises SaveError where the last checkpoint is not on disk, if the run is to end with it."""
        self._complete()
        self._behind.shutdown()
        if last_counts and self._failure is not None:
            raise self._failure

    def _complete(self) -> None:
        """Wait for this rank's thread, and commit with the others."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        try:
            written, problem = save.writing.result()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            written, problem = {}, f"{type(error).__name__}: {error}"
        self._commit(save.step, save.temporary, written, problem, save.started, save.blocked_s)

    def _commit(self, step: int, temporary: Path, written: Files, problem: str | None, started: float, blocked_s: float) -> None:
        begun = time.monotonic()
        try:
            path = commit(temporary, written, problem)
        except SaveError as error:
            self._tell_failure(step, error)
            return
        self._failure = None
        for dropped in self._drop_old():
            self._behind.submit(shutil.rmtree, dropped, ignore_errors=True)
        now = time.monotonic()
        seconds = {"seconds": round(now - started, 3), "blocked_s": round(blocked_s + now - begun, 3)}
        self._tracker.event("saved", step, checkpoint=path.name, **seconds)

    def _drop_old(self) -> list[Path]:
        """The folders to delete; on rank 0 alone."""
        if not is_main():
            return []
        try:
            return drop_old(self._folder, self._policy)
        except OSError as error:
            _log.warning("old checkpoints could not be dropped (%s)", error)
            return []

    def _tell_failure(self, step: int, error: SaveError) -> None:
        self._failure = error
        self._tracker.event("checkpoint failed", step, reason=str(error))
        if is_main():
            _log.warning("%s; earlier checkpoints are untouched, and training goes on: make room in %s", error, self._folder)


class Staging:
    """Copies of this rank's part of the state, in buffers that are made once: memory that is new to a process is slow to write to, and on a
    GPU pinned memory is several times as fast to copy to."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def hold(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """The copies; they are good until the next call."""
        held = []
        on_gpu = False
        for number, (part, tensor) in enumerate(tensors):
            if number == len(self._buffers) or not _alike(self._buffers[number], tensor):
                self._buffers[number:] = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)]
            held.append((part, self._buffers[number].copy_(tensor.detach(), non_blocking=True)))
            on_gpu |= tensor.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return held


def _alike(buffer: torch.Tensor, tensor: torch.Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype
