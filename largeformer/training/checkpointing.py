"""What a checkpoint holds, and how it is read: everything that the next step depends on, in one folder.

    step_00000100/
      weights/*.safetensors      in the model's dtype, by global name
      optimizer/*.safetensors    float32 moments, and masters where weights are not float32, by `kind.name`
      random/rank_00000.safetensors
      state.json                 layout, progress, optimizer steps, loss scaler, early stopping, validation, W&B run id, named parts
      config.yaml                the resolved recipe
      checksums.json             size and SHA-256 of all of these; written last

Tensors belong to no layout: another one reads the same files. Random states belong to a rank's place in its layout; at another
layout they are drawn anew from seed and step: tensor-parallel ranks must draw alike, data-parallel ones must not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from largeformer.artifact import library_versions, write_atomically
from largeformer.checkpoint.format import SUFFIX, Block, Place, ShardWriter, Tensors, read_headers, write_blocks
from largeformer.checkpoint.manifest import DamagedError, Digest, Files, read_manifest
from largeformer.errors import BadInputError
from largeformer.models.shards import Shard
from largeformer.parallel.agreement import from_main, is_main
from largeformer.parallel.device import fits_device, restore_rng_states, rng_states, seed_ranks
from largeformer.tracking.jsonl import encode
from largeformer.training.engine import Engine, StepResult
from largeformer.training.state import OPTIMIZER, WEIGHTS, weight_blocks

_log = logging.getLogger(__name__)
FORMAT = 1
STATE, CONFIG, RANDOM = "state.json", "config.yaml", "random"
LIBRARIES = ("torch", "deepspeed", "megatron-core", "safetensors")


@dataclass(frozen=True)
class Progress:
    """Where training stands. `step`: global batches consumed; `skipped`: those whose step was not taken, which the learning
    rate does not count either; `samples`, `tokens`: consumed, valid tokens only. `samples` is also the place in the data."""

    step: int = 0
    skipped: int = 0
    samples: int = 0
    tokens: int = 0

    @property
    def next_optimizer_step(self) -> int:
        """The number that the learning-rate schedule is asked for, from 1."""
        return self.step - self.skipped + 1

    def after(self, result: StepResult, samples: int) -> Progress:
        return replace(self, step=self.step + 1, skipped=self.skipped + result.skipped, samples=samples, tokens=self.tokens + result.tokens)


class Stateful(Protocol):
    """A part of the run that a checkpoint keeps, under a name of its own in `TrainingState.extra`. The state is JSON, alike on every
    rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class TrainingState:
    """What `state.json` holds beside the tensors. `validation`: the latest row, with its step; empty before the first. `extra`: the states
    of `Stateful` parts, by name."""

    progress: Progress
    early_stopping: dict[str, Any] = field(default_factory=dict)
    wandb_run_id: str | None = None
    validation: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def restore(self, parts: Mapping[str, Stateful]) -> None:
        """Hand each part what it left; one that the checkpoint does not know stays as it is."""
        for name, part in parts.items():
            if name in self.extra:
                part.load_state_dict(self.extra[name])


@dataclass(frozen=True)
class Contents:
    """What this rank writes: `places` by folder, whose tensors come one at a time; and what is small enough to be at hand."""

    rank: int
    places: dict[str, list[Place]]
    random: list[Block]
    texts: dict[str, bytes]


def contents_of(engine: Engine, state: TrainingState, config_yaml: str) -> Contents:
    """Collective: the ranks settle who writes what."""
    random = [Block(name, value.clone(), (0,) * value.dim(), tuple(value.shape)) for name, value in rng_states().items()]
    record = {
        "format": FORMAT,
        "layout": asdict(engine.groups.layout),
        "optimizer": {"kinds": engine.state.kinds(), "steps": engine.state.optimizer_steps},
        "loss_scaler": engine.scaler_state(),
        "versions": library_versions(LIBRARIES),
        **asdict(state),
    }
    texts = {STATE: (json.dumps(json.loads(encode(record)), indent=2) + "\n").encode(), CONFIG: config_yaml.encode()}
    return Contents(engine.groups.rank, engine.state.places(), random, texts if engine.groups.rank == 0 else {})


def first_state() -> bytes:
    """`state.json` of a model that was not trained here: nothing is done, and no layout is the one that it was saved at."""
    record = {
        "format": FORMAT,
        "layout": {},
        "optimizer": {"kinds": [], "steps": 0},
        "loss_scaler": {},
        **asdict(TrainingState(Progress())),
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def write_contents(folder: Path, contents: Contents, tensors: Iterable[tuple[str, Any]]) -> tuple[Files, str | None]:
    """Write this rank's files below `folder`; returns what they are, or why they could not be written.

    `tensors` is gone through to its end in any case, since other ranks may be waiting in it.
    """
    name = f"rank_{contents.rank:05d}{SUFFIX}"
    writers: dict[str, ShardWriter] = {}
    written: Files = {}
    problem: str | None = None
    try:
        for part, places in contents.places.items():
            if places:
                (folder / part).mkdir(exist_ok=True)
                writers[part] = ShardWriter(folder / part / name, places)
    except OSError as error:
        problem = str(error)
    for part, tensor in tensors:
        if problem is None:
            try:
                writers[part].append(tensor)
            except OSError as error:
                problem = str(error)
    try:
        if problem is None:
            written = {f"{part}/{name}": writer.close() for part, writer in writers.items()}
            (folder / RANDOM).mkdir(exist_ok=True)
            written[f"{RANDOM}/{name}"] = write_blocks(folder / RANDOM / name, contents.random)
            for text, content in contents.texts.items():
                write_atomically(folder / text, content)
                written[text] = Digest.of(content)
    except OSError as error:
        problem = str(error)
    for writer in writers.values():
        writer.abandon()
    return written, problem


def load_weights(checkpoint: Path, shards: Sequence[Shard], named: Callable[[str], str] = str) -> None:
    """Read the weights into the parameters. `named`: what a weight is called in the checkpoint. Collective, and before the engine is
    built."""
    open_tensors(checkpoint, WEIGHTS).read(replace(block, name=named(block.name)) for block in weight_blocks(shards))


def load_training_state(checkpoint: Path, engine: Engine, seed: int = 0) -> TrainingState:
    """Read the rest into an engine whose weights were read before it was built. Collective. `seed`: the recipe's."""
    record = from_main(lambda: read_state(checkpoint))
    optimizer = record["optimizer"]
    held = {part: open_tensors(checkpoint, part) for part in (WEIGHTS, OPTIMIZER)}
    of_use = engine.state.load(optimizer["kinds"], optimizer["steps"], lambda part, blocks: held[part].read(blocks))
    if not of_use and is_main():
        _log.warning("%s holds %s, of another optimizer: this one begins anew", checkpoint, " and ".join(optimizer["kinds"]))
    engine.restore_scaler(record["loss_scaler"])
    progress = Progress(**record["progress"])
    random = random_states(checkpoint, engine.groups.rank) if record["layout"] == asdict(engine.groups.layout) else {}
    if random and fits_device(random):
        restore_rng_states(random)
    else:
        at = engine.groups.coordinates
        seed_ranks(seed + 1_000_003 * progress.step, at.tensor, at.data, at.pipeline)
    return TrainingState(progress, record["early_stopping"], record["wandb_run_id"], record["validation"], record["extra"])


def open_tensors(checkpoint: Path, part: str) -> Tensors:
    """The tensors of one folder of a checkpoint. Collective: rank 0 reads the headers, for all."""
    stored = from_main(lambda: read_headers(checkpoint, [name for name in read_manifest(checkpoint) if name.startswith(f"{part}/")]))
    return Tensors(checkpoint / part, stored)


def random_states(checkpoint: Path, rank: int) -> dict[str, torch.Tensor]:
    """What `rng_states` gave on `rank`. Raises DamagedError where its file cannot be read."""
    path = checkpoint / RANDOM / f"rank_{rank:05d}{SUFFIX}"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises BadInputError where it is not one that this version writes."""
    path = checkpoint / STATE
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record["format"] != FORMAT:
            raise BadInputError(f"{path} is of format {record['format']}, and this version reads {FORMAT}: use the version that wrote it")
        wanted = ("layout", "optimizer", "loss_scaler", "progress", "early_stopping", "wandb_run_id", "validation", "extra")
        missing = [key for key in wanted if key not in record]
        if missing:
            raise KeyError(", ".join(missing))
    except BadInputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({type(error).__name__}: {error}); name another checkpoint") from None
    return record
