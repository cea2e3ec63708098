"""Chains of stages behind a trained teacher, for benchmarks that compare what comes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

# A short training on its own, whatever the teacher's was.
COURSE: dict[str, Any] = {
    "train": {"train_iters": 300, "eval_interval": 100, "early_stopping": None},
    "optimizer": {
        "lr": 1.0e-3,
        "min_lr": 2.0e-5,
        "lr_decay_style": "cosine",
        "lr_decay_iters": None,
        "lr_wsd_decay_iters": None,
        "lr_warmup_iters": 20,
    },
}
QUALITY = {"tokens": 65536, "shapes": [[1, 128]]}


def teacher_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of the run folder's teacher, without what it says of stages after it."""
    tree: dict[str, Any] = yaml.safe_load((run / "pretrain" / "config.yaml").read_text())
    tree["checkpoint"] = {**tree.get("checkpoint", {}), "keep_last": 1, "keep_every": None}
    for section in ("prune", "distill", "quantize", "export"):
        tree.pop(section, None)
    return {**tree, "quality": QUALITY, "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False}}


def run_chain(
    teacher: Path, folder: Path, copied: Sequence[str], stages: Sequence[Any], sections: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], int]:
    """`largeformer run` in `folder`, which begins with copies of the teacher's stages `copied`; what is finished there is not done again.
    What `quality` says of each stage that has finished, by its name, with its `sparsity` and `val_loss`; and the exit code."""
    for stage in copied:
        if not (folder / stage).exists():
            shutil.copytree(teacher / stage, folder / stage)
    tree = {**teacher_recipe(teacher), **sections}
    tree["run"] = {**tree["run"], "name": folder.name, "output_dir": str(folder), "stages": [*copied, *stages]}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    code = subprocess.run([sys.executable, "-m", "largeformer", "run", "-c", str(recipe), *overrides], check=False).returncode
    return {path.parent.name: figures for path in folder.glob("*/manifest.json") if (figures := _figures(path)) is not None}, code


def _figures(manifest: Path) -> dict[str, Any] | None:
    try:
        metrics = json.loads(manifest.read_text())["metrics"]
    except ValueError:  # the run has said so
        return None
    if "quality" not in metrics:
        return None
    return {**metrics["quality"], "sparsity": metrics.get("sparsity", {}).get("overall"), "val_loss": metrics.get("val_loss")}
