"""The recipe's section `tracking`: where the record of a run goes, beside `metrics.jsonl`."""

from __future__ import annotations

from typing import Literal

from largeformer.config.section import Section


class WandbConfig(Section):
    """`name` defaults to `run.name`. Offline runs wait in the run folder for `largeformer sync`."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "largeformer"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class TrackingConfig(Section):
    """`sample_prompts` are gone on with at each validation, as the section `generate` says, where the layout can generate: one pipeline
    stage and no sequence parallelism."""

    wandb: WandbConfig = WandbConfig()
    tensorboard: bool = True
    sample_prompts: tuple[str, ...] = ()
