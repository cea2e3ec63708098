"""What a teacher is worth: `python tests/benchmarks/distillation.py RUN [--layers N] [--seeds N] [--keep FOLDER] [section.key=value ...]`.

RUN: the run folder of a trained teacher (prepare, pretrain). Students of N layers (half the teacher's), initialised from its layers or at
random, are trained with and without it, alike in all else: at equal tokens, in the same order, for each seed. Further arguments
change the recipe, such as train.train_iters=500 optimizer.lr=1e-3. The table shows the loss on the run's validation text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

STUDENTS = {
    "teacher's layers": {"init": "teacher_layers"},
    "random": {"init": "scratch"},
}
WAYS: dict[str, dict[str, Any]] = {"with the teacher": {}, "without": {"alpha": 0.0}}


def stages(layers: int, seeds: int) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Each student's entry of `run.stages`, by how it begins and learns, and by seed."""
    found = {}
    for start, student in STUDENTS.items():
        for way, settings in WAYS.items():
            for seed in range(1, seeds + 1):
                name = f"{student['init']}-{'alone' if settings else 'taught'}-{seed}"
                shape = {"student": {**student, "model": {"num_layers": layers}}}
                found[start, way, seed] = {"distill": {"name": name, "seed": seed, **shape, **settings}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="where the students' run goes, and stays; what is there already is not done again")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary) / "run"
        folder.mkdir(parents=True, exist_ok=True)
        tree = yaml.safe_load((given.run / "pretrain" / "config.yaml").read_text())
        entries = stages(given.layers or tree["model"]["num_layers"] // 2, given.seeds)
        tree["run"] |= {"name": folder.name, "output_dir": str(folder), "stages": ["prepare", *entries.values()]}
        tree.pop("quality", None)  # its limits are of other stages
        tree["distill"] = {"teacher": str((given.run / "pretrain").resolve())}
        tree["tracking"] = {"wandb": {"mode": "disabled"}, "tensorboard": False}
        tree["checkpoint"] = {**tree.get("checkpoint", {}), "load": None, "keep_last": 1}
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(tree))
        if not (folder / "prepare").exists():
            shutil.copytree(given.run / "prepare", folder / "prepare")
        subprocess.run([sys.executable, "-m", "largeformer", "run", "-c", str(recipe), *given.overrides], check=True)
        losses = {key: _loss(folder / entry["distill"]["name"]) for key, entry in entries.items()}
    teacher = _loss(given.run / "pretrain")
    print(f"teacher: {tree['model']['num_layers']} layers, validation loss {teacher:.4f}; students: {given.layers or 'half as many'}")
    print(
        f"{'initialised from':20}{'trained':20}" + "".join(f"{f'seed {seed}':>10}" for seed in range(1, given.seeds + 1)) + f"{'mean':>10}"
    )
    for start in STUDENTS:
        for way in WAYS:
            row = [losses[start, way, seed] for seed in range(1, given.seeds + 1)]
            print(f"{start:20}{way:20}" + "".join(f"{loss:>10.4f}" for loss in [*row, statistics.mean(row)]))


def _loss(stage: Path) -> float:
    return float(json.loads((stage / "manifest.json").read_text())["metrics"]["val_loss"])


if __name__ == "__main__":
    main()
