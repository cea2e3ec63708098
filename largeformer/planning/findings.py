"""What the doctor says, and what it is asked: values, shared by the files that check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.schema import Recipe
from largeformer.config.size import model_parameters
from largeformer.planning.stored import checkpoint_bytes, kept_checkpoints

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `remedy` is empty where nothing is to be done."""

    check: str
    level: Level
    message: str
    remedy: str = ""


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of the machine. `compiled_adam`: an Adam that DeepSpeed compiles; `compiled_layers`: by `torch.compile`;
    `disk_bytes`: the checkpoints kept."""

    precision: str
    compiled_adam: bool
    compiled_layers: bool
    nvme: bool
    wandb_online: bool
    disk_bytes: int
    output_dir: Path

    @classmethod
    def of(cls, recipe: Recipe, deepspeed: Mapping[str, Any]) -> Needs:
        zero = ZeroConfig.of(deepspeed)
        optimizer = recipe.optimizer
        adam = optimizer.type != "sgd"
        offloaded = zero.offload_optimizer != "none"
        parameters = model_parameters(recipe.model, recipe.padded_vocab_size)
        return cls(
            precision=recipe.train.precision,
            compiled_adam=adam and (optimizer.backend.startswith("deepspeed") or (offloaded and optimizer.backend == "auto")),
            compiled_layers=recipe.train.compile,
            nvme="nvme" in (zero.offload_optimizer, zero.offload_param),
            wandb_online=recipe.tracking.wandb.mode == "online",
            # One more than is kept: the new checkpoint is complete before the oldest goes.
            disk_bytes=checkpoint_bytes(recipe) * parameters * (kept_checkpoints(recipe) + 1),
            output_dir=Path(recipe.run.output_dir),
        )
