"""Weights & Biases: offline unless the recipe asks for online.

The charts' axis is the training step, not W&B's own counter, so that validation rows fall onto the step they belong to; every row
carries the tokens too, the other axis. Several processes of one run (preempted, killed, requeued) draw one curve: what an earlier one
has logged is not logged again, and what it lost is taken from `metrics.jsonl`. Offline runs wait in `<folder>/wandb` for
`largeformer sync`.

W&B is given what this file names and nothing else: it would keep the command line, the host, the user, git addresses and installed
packages of its own accord, and any of them may hold a secret.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from largeformer.artifact import MANIFEST, Artifact
from largeformer.config.tracking import WandbConfig
from largeformer.tracking.names import ALERTS, STEP, TOKENS
from largeformer.tracking.reading import read_lines
from largeformer.tracking.tracker import Row, Tracker, chart_values
from largeformer.tracking.wandb_file import note, recorded

START_SECONDS = 30.0
"""How long the server may take to answer at the start before the run is recorded offline."""
FINISH_SECONDS = 60.0
"""How long the last upload may take, and likewise that of an artifact; what it leaves lies on disk."""
FLUSH_SECONDS = 2.0
"""Seconds of history that a killed process may lose; W&B's own default is 15."""

_LONGEST_TITLE = 63  # characters; W&B refuses more
_BETWEEN_ALERTS = 300.0  # seconds until one of the same title is sent again

_log = logging.getLogger(__name__)


class WandbTracker(Tracker):
    """One W&B run. `record` is what it keeps as its config; `resume_step` is the step of the checkpoint that training goes on from.

    Raises what W&B raises where not even an offline run can be started.
    """

    def __init__(
        self, config: WandbConfig, folder: Path, run_name: str, record: Mapping[str, Any], run_id: str, resume_step: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._name = config.name or run_name
        self._folder, self._id = folder, run_id
        self._recorded, line = recorded(folder, run_id)
        self._logged = dict(self._recorded)
        self._run = _start_or_fall_back(config, folder, self._name, record, run_id)
        self._run.define_metric(STEP)
        self._run.define_metric(TOKENS, step_metric=STEP)
        self._run.define_metric("*", step_metric=STEP)
        # W&B counts rows, and wants the count to rise over all processes of a run; by itself it begins each offline one at 0.
        self._line = max(line, self._run.step)
        self._tokens: float | None = None
        self._last_step = resume_step
        self._samples: list[list[Any]] = []
        self._catch_up(folder)

    def log(self, row: Row) -> None:
        kind, step = _kind(row), int(row[STEP] or 0)
        self._tokens = row.get("tokens", self._tokens)
        self._last_step = step
        if step <= self._recorded.get(kind, -1):
            return  # logged by an earlier process, after the checkpoint from which this one goes on
        self._recorded.pop(kind, None)  # from here on all is new, also after going back to a checkpoint
        self._logged[kind] = step
        self._write(step, chart_values(row))

    def event(self, kind: str, step: int, **fields: Any) -> None:
        if kind == "rewound":
            self._recorded.clear()  # the steps that come are others, though they have been there before
        self._write(step, {f"events/{kind}": 1})
        if kind in ALERTS:
            told = ", ".join(f"{field} {value}" for field, value in fields.items())
            self._alert(f"{self._name}: {kind}", f"At step {step}{': ' if told else ''}{told}", ALERTS[kind])

    def sample(self, step: int, prompt: str, text: str) -> None:
        # A logged table cannot grow, so that each sample logs all of this process's samples anew.
        self._samples.append([step, prompt, text])
        self._write(step, {"samples": wandb.Table(columns=["step", "prompt", "text"], data=self._samples)})

    def artifact(self, made: Artifact, sources: Sequence[Artifact]) -> None:
        def send() -> None:
            # The public `use_artifact` works online alone, and waits for the upload without a limit.
            for source in sources:
                self._run._log_artifact(self._described(source), is_user_created=True, use_after_commit=True)
            self._run.log_artifact(self._described(made), aliases=["latest", made.identity])

        _within(FINISH_SECONDS, send)

    def close(self, status: str) -> None:
        if status == "requeue":
            self._run.mark_preempting()  # shown as preempted, not crashed, until the requeued job continues it
        else:
            level = "INFO" if status == "finished" else "ERROR"
            self._alert(f"{self._name}: {status}", f"At step {self._last_step}.", level)
        note(self._folder, self._id, self._logged, self._line)
        try:
            _within(FINISH_SECONDS, lambda: self._run.finish(exit_code=0 if status == "finished" else 1))
        except TimeoutError as error:
            _end_service()
            raise TimeoutError(f"the last upload: {error}; the rest lies on disk, for `largeformer sync --online`") from None

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        axes = {STEP: step} if self._tokens is None else {STEP: step, TOKENS: self._tokens}
        self._run.log({**axes, **values}, step=self._line, commit=True)
        self._line += 1

    def _alert(self, title: str, text: str, level: str) -> None:
        self._run.alert(title[:_LONGEST_TITLE], text, level, wait_duration=_BETWEEN_ALERTS)

    def _catch_up(self, folder: Path) -> None:
        """Log the rows up to the checkpoint that no earlier process of this run got as far as writing."""
        # Online, the server may know more than what is here.
        self._recorded["train"] = max(self._recorded.get("train", -1), _number(self._run.summary.get(STEP)))
        for row in read_lines(folder / "metrics.jsonl").rows:
            self.log(row)

    def _described(self, made: Artifact) -> wandb.Artifact:
        """Name, identity, parents, metrics, and the files that say how it was made. Weights stay where they are: they are large."""
        metadata = {"identity": made.identity, "parents": made.parents, "metrics": made.metrics, "versions": made.versions}
        described = wandb.Artifact(f"{_plain(self._name)}-{_plain(made.path.name)}", type=made.kind, metadata=metadata)
        for name in (MANIFEST, "config.yaml"):
            if (made.path / name).exists():
                described.add_file(str(made.path / name), policy="immutable")  # not copied to W&B's own folder first
        return described


def _start_or_fall_back(config: WandbConfig, folder: Path, name: str, record: Mapping[str, Any], run_id: str) -> wandb.Run:
    if config.mode != "online":
        return _start("offline", config, folder, name, record, run_id)
    try:
        return _start("online", config, folder, name, record, run_id)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        _log.warning("W&B cannot be reached (%s); this run is recorded offline: send it later by `largeformer sync`", reason)
        wandb.teardown()  # the failed start still holds the run's id
        return _start("offline", config, folder, name, record, run_id)


def _start(mode: str, config: WandbConfig, folder: Path, name: str, record: Mapping[str, Any], run_id: str) -> wandb.Run:
    settings = wandb.Settings(
        silent=True,
        console="off",  # the progress bar is not to be captured
        save_code=False,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        init_timeout=START_SECONDS,
    )
    return wandb.init(
        mode="online" if mode == "online" else "offline",
        project=config.project,
        entity=config.entity,
        group=config.group,
        job_type=folder.name,
        tags=config.tags,
        name=name,
        id=run_id,
        resume="allow",
        dir=str(folder),
        config=dict(record),
        allow_val_change=True,  # a run may go on with another layout
        settings=settings,
    )


def _kind(row: Row) -> str:
    return "val" if "val_loss" in row else "train"


def _number(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else -1


def _plain(name: str) -> str:
    """`name` in the characters that an artifact's may have."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name) or "run"


def _end_service() -> None:
    """End W&B's own process, which would go on trying for ever: this program could not end before it."""
    for task in Path("/proc/self/task").iterdir():
        for child in _read(task / "children").decode().split():
            if b"wandb-core" in _read(Path(f"/proc/{child}/cmdline")):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)


def _read(path: Path) -> bytes:
    """Of a thread or process that may have ended since it was listed: then nothing."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _within(seconds: float, call: Callable[[], None]) -> None:
    """`call`, given up after `seconds`: its thread ends with the process. Raises what it raises, or TimeoutError."""
    failed: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="wandb artifact", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    for error in failed:
        raise error
