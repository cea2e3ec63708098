"""Save and resume: everything that the next step depends on, in one folder.

    step_00000100/
      weights/*.safetensors      in the model's dtype, by global name
      optimizer/*.safetensors    float32 masters and moments, by `kind.name`
      random/rank_00000.safetensors
      state.json                 layout, progress, optimizer steps, loss scaler, early stopping, W&B run id
      config.yaml                the resolved recipe

Tensors belong to no layout: another one reads the same files. Random states belong to a rank's place in its layout, and are
left at another: tensor-parallel ranks must draw alike, data-parallel ones must not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from largeformer.artifact import write_atomically
from largeformer.checkpoint.commit import new_checkpoint
from largeformer.checkpoint.format import read_blocks, write_blocks
from largeformer.checkpoint.retention import drop_old
from largeformer.errors import BadInputError
from largeformer.models.shards import Shard
from largeformer.parallel.device import restore_rng_states, rng_states
from largeformer.training.engine import Engine, StepResult
from largeformer.training.state import weight_blocks


@dataclass(frozen=True)
class Progress:
    """Where training stands. `step`: global batches consumed; `skipped`: those whose step was not taken, which the learning
    rate does not count either; `samples`, `tokens`: consumed, valid tokens only."""

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


def save_checkpoint(folder: Path, engine: Engine, state: TrainingState, config_yaml: str, keep_last: int) -> Path:
    """Write and commit a checkpoint under `folder`; collective. Returns its path."""
    step = state.progress.step
    with new_checkpoint(folder, step) as path:
        kinds = ("master", *engine.state.moments)
        write_blocks(path / "weights", list(engine.state.weight_blocks()))
        write_blocks(path / "optimizer", list(engine.state.blocks(kinds)))
        (path / "random").mkdir(exist_ok=True)
        save_file(rng_states(), path / "random" / f"rank_{engine.groups.rank:05d}.safetensors")
        if engine.groups.rank == 0:
            record = {
                "format": 1,
                "layout": asdict(engine.groups.layout),
                "optimizer": {"kinds": kinds, "steps": engine.state.optimizer_steps},
                "loss_scaler": engine.scaler_state(),
                **asdict(state),
            }
            write_atomically(path / "state.json", (json.dumps(record, indent=2) + "\n").encode())
            write_atomically(path / "config.yaml", config_yaml.encode())
    if engine.groups.rank == 0:
        drop_old(folder, keep_last)
    return folder / f"step_{step:08d}"


def load_weights(checkpoint: Path, shards: Sequence[Shard]) -> None:
    """Read the weights into the parameters. Collective, and before the engine is built."""
    read_blocks(checkpoint / "weights", weight_blocks(shards))


def load_training_state(checkpoint: Path, engine: Engine) -> TrainingState:
    """Read the rest into an engine whose weights were read before it was built. Collective."""
    record = read_state(checkpoint)
    optimizer = record["optimizer"]
    engine.state.load(optimizer["kinds"], optimizer["steps"], lambda blocks: read_blocks(checkpoint / "optimizer", blocks))
    engine.restore_scaler(record["loss_scaler"])
    if record["layout"] == asdict(engine.groups.layout):
        states: dict[str, torch.Tensor] = load_file(checkpoint / "random" / f"rank_{engine.groups.rank:05d}.safetensors")
        restore_rng_states(states)
    return TrainingState(
        Progress(**record["progress"]), record["early_stopping"], record["wandb_run_id"], record["validation"], record["extra"]
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    path = checkpoint / "state.json"
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}); name another checkpoint") from error
    return record
