"""When checkpoints are written, which are kept, and how far one is trusted."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from largeformer.config.section import PositiveInt, Section


class CheckpointConfig(Section):
    """`keep_last`: the newest so many stay; `keep_every`: and each whose step is a multiple of it; `keep_best`: and the so many best by
    validation. `async_save`: written behind the training, from a second copy of the state in host memory. `verify`: what is compared before
    a checkpoint is loaded; sizes are in any case. `load`: a checkpoint, or a folder of them, that `pretrain` goes on from."""

    save_interval: PositiveInt | None = None
    keep_last: PositiveInt = 3
    keep_every: PositiveInt | None = None
    keep_best: Annotated[int, Field(ge=0)] = 0
    async_save: bool = False
    verify: Literal["sha256", "size"] = "sha256"
    load: str | None = None
