"""Weights & Biases: offline unless the recipe asks for online and a key is there.

The charts' axis is the training step, not W&B's own counter, so that validation rows fall onto the step they belong to, and
several processes of one run (preempted, requeued) draw one curve. Offline runs wait in `<folder>/wandb` for `wandb sync`.
"""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb

from largeformer.config.schema import WandbConfig
from largeformer.tracking.tracker import Row, chart_values

START_SECONDS = 30.0
"""How long the server may take to answer at the start before the run is recorded offline."""
FINISH_SECONDS = 60.0
"""How long the last upload may take; what it leaves lies on disk."""

_log = logging.getLogger(__name__)


class WandbTracker:
    """One W&B run. Raises what W&B raises where not even an offline run can be started."""

    def __init__(self, config: WandbConfig, folder: Path, run_name: str, recipe: Mapping[str, Any], run_id: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        mode = "online" if config.mode == "online" and _key_or_warning() else "offline"
        try:
            self._run = _start(mode, config, folder, run_name, recipe, run_id)
        except Exception as error:
            if mode == "offline":
                raise
            reason = str(error).partition("\n")[0]
            _log.warning("W&B cannot be reached (%s); this run is recorded offline: send it later by `largeformer sync`", reason)
            wandb.teardown()  # the failed start still holds the run's id
            self._run = _start("offline", config, folder, run_name, recipe, run_id)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._samples: list[list[Any]] = []

    def log(self, row: Row) -> None:
        self._run.log({"step": row["step"], **chart_values(row)})

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._run.log({"step": step, f"events/{kind}": 1})

    def sample(self, step: int, prompt: str, text: str) -> None:
        # A logged table cannot grow, so that each sample logs all of this process's samples anew.
        self._samples.append([step, prompt, text])
        self._run.log({"step": step, "samples": wandb.Table(columns=["step", "prompt", "text"], data=self._samples)})

    def close(self, status: str) -> None:
        if status == "requeue":
            self._run.mark_preempting()  # shown as preempted, not crashed, until the requeued job continues it
        self._run.finish(exit_code=0 if status == "finished" else 1)


def _start(mode: str, config: WandbConfig, folder: Path, run_name: str, recipe: Mapping[str, Any], run_id: str) -> wandb.Run:
    settings = wandb.Settings(
        silent=True,
        console="off",  # the progress bar is not to be captured
        save_code=False,
        init_timeout=START_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    return wandb.init(
        mode="online" if mode == "online" else "offline",
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=config.tags,
        name=config.name or run_name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(recipe),
        settings=settings,
    )


def _key_or_warning() -> bool:
    host = urlsplit(wandb.setup(wandb.Settings(silent=True)).settings.base_url).netloc
    if has_key(host):
        return True
    _log.warning("tracking.wandb.mode is online, but there is no key for %s (WANDB_API_KEY, or `wandb login`): recording offline", host)
    return False


def has_key(host: str) -> bool:
    """Whether W&B would find a key for `host` without asking: in the environment, or in the netrc file where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
