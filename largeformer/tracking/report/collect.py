"""What a run folder tells about itself, as far as it is whole.

Nothing here fails for a file that is missing, half-written or garbage: what cannot be read becomes a sentence in `problems`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from largeformer.artifact import MANIFEST, Artifact, is_set_aside, read_status
from largeformer.errors import BadInputError
from largeformer.tracking.reading import last_pass, read_lines

METRICS, EVENTS, CONFIG = "metrics.jsonl", "events.jsonl", "config.yaml"


@dataclass
class Stage:
    """A stage's folder. `training` and `validation` are rows in the order of their steps; `config` is flat: `section.key` -> value."""

    name: str
    artifact: Artifact | None = None
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Run:
    """A run folder: its stages in the order in which they were made, and what could not be read."""

    name: str
    path: Path
    status: dict[str, Any]
    stages: list[Stage]
    problems: list[str]


def collect(folder: Path) -> Run:
    """The run at `folder`: an output folder with stages in it, or one stage's folder. Raises BadInputError where it is neither."""
    if not folder.is_dir():
        raise BadInputError(f"{folder}: there is no such folder; name a run's output folder, such as runs/quickstart")
    if folder.name in ("", ".."):  # a stage is known by the name of its folder
        folder = folder.resolve()
    stage_folders = [folder] if _is_stage(folder) else sorted(filter(_is_stage, folder.iterdir()))
    if not stage_folders:
        raise BadInputError(f"{folder} holds neither metrics.jsonl nor a stage that does; name a run's output folder")
    home = folder.parent if _is_stage(folder) else folder
    problems: list[str] = []
    stages = sorted((_stage(path, problems) for path in stage_folders), key=_depth)
    try:
        status = read_status(home) or {}
    except BadInputError as error:
        status = {}
        problems += error.problems
    names = [stage.config.get("run.name") for stage in stages]
    name = next((str(given) for given in names if given), home.resolve().name)
    return Run(name, folder, status, stages, problems)


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, MANIFEST)) and not is_set_aside(folder)


def _depth(stage: Stage) -> tuple[int, str]:
    """Stages with more ancestors come later; one that is not finished yet has the most."""
    order = {"prepare": 0, "pretrain": 1}
    known = len(stage.artifact.parents) if stage.artifact is not None else 9
    return (order.get(stage.name, 2 + known), stage.name)


def _stage(folder: Path, problems: list[str]) -> Stage:
    stage = Stage(folder.name)
    try:
        stage.artifact = Artifact.read(folder)
    except BadInputError as error:
        problems += error.problems
    _read_config(stage, folder / CONFIG, problems)
    rows = _whole(folder / METRICS, problems)
    stage.training = last_pass([row for row in rows if "val_loss" not in row])
    stage.validation = last_pass([row for row in rows if "val_loss" in row])
    for event in _whole(folder / EVENTS, problems):
        (stage.samples if event.get("event") == "sample" else stage.events).append(event)
    return stage


def _read_config(stage: Stage, path: Path, problems: list[str]) -> None:
    try:
        stage.config_text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(stage.config_text)
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"{path} cannot be read ({type(error).__name__}): the report goes on without it")
        return
    stage.config = dict(_flat(tree, ""))


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))


def _whole(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        lines = read_lines(path)
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror}): the report goes on without it")
        return []
    if lines.broken:
        shown = ", ".join(map(str, lines.broken[:3])) + (", ..." if len(lines.broken) > 3 else "")
        what = "line" if len(lines.broken) == 1 else "lines"
        problems.append(f"{path}: {len(lines.broken)} {what} of {len(lines.rows) + len(lines.broken)} not whole ({what} {shown}), left out")
    return lines.rows


def shown(value: Any) -> str:
    """A value of a recipe as it stands in YAML's short form."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
