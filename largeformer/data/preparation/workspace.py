"""The folder in which prepare works, so that it can be interrupted at any point: `<output_dir>/prepare/work/`.

plan.json          what the parts are made of and from; parts of another plan are not used
base/              of the finished prepare to which is added: its statistics and its list of files
<source>/          parts
merged/            the new files, complete, before they are moved to their place
switched           they are there: only the manifest is, perhaps, to be written
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from largeformer.artifact import write_atomically
from largeformer.data.preparation.statistics import Statistics

FILES = "files.jsonl"
STATISTICS = "statistics.json"
_PLAN, _SWITCHED, _VERSION = "plan.json", "switched", 1


@dataclass(frozen=True)
class Workspace:
    """`folder` is the prepare folder."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "work"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def base(self) -> Path:
        return self.root / "base"

    def read_plan(self) -> dict[str, Any] | None:
        """The plan that was begun, or None."""
        try:
            plan = json.loads((self.root / _PLAN).read_bytes())
        except (OSError, ValueError):
            return None
        return plan if isinstance(plan, dict) and plan.get("version") == _VERSION else None

    def begin(self, plan: dict[str, Any], add_to: Path | None = None) -> None:
        """Throw away what lies here, and begin `plan`; `add_to` is the finished prepare folder to which it adds."""
        self.remove()
        self.base.mkdir(parents=True)
        if add_to is not None:
            for name in (STATISTICS, FILES):
                shutil.copyfile(add_to / name, self.base / name)
        write_atomically(self.root / _PLAN, json.dumps({**plan, "version": _VERSION}).encode())

    def base_statistics(self) -> Statistics:
        path = self.base / STATISTICS
        return Statistics.load(path) if path.exists() else Statistics([])

    def base_files(self) -> list[str]:
        """The rows of the files that are prepared already."""
        path = self.base / FILES
        return path.read_text().splitlines() if path.exists() else []

    def parts(self, source: str) -> Path:
        folder = self.root / source
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def switch(self, first: Callable[[], None]) -> None:
        """After `first`, move every file of `merged` to its place in the prepare folder. Done again where it was interrupted."""
        first()
        for path in sorted(self.merged.rglob("*")):
            if path.is_file() or path.is_symlink():
                target = self.folder / path.relative_to(self.merged)
                target.parent.mkdir(exist_ok=True)
                os.replace(path, target)
        (self.root / _SWITCHED).touch()

    def remove_if_done(self) -> None:
        if (self.root / _SWITCHED).exists():
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
