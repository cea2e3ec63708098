"""What pruning costs a trained model, before and after distillation: `python tests/benchmarks/pruning.py RUN --keep FOLDER [--only NAME]`.

RUN: the run folder of a trained teacher (prepare, pretrain). Each branch is a run of its own in FOLDER that begins with a copy of it; what
is finished there is not done again. Further arguments change the recipe, such as `distill.train={train_iters: 200}`. The table is
that of `quality`, over held-out text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from largeformer.config.schema import ModelConfig
from largeformer.config.size import model_parameters

DISTILL = {
    "teacher": "pretrain",
    "train": {"train_iters": 300, "eval_interval": 100},
    "optimizer": {"lr": 1.0e-3, "lr_decay_style": "cosine", "lr_wsd_decay_iters": None, "lr_warmup_iters": 20},
}
QUALITY = {"tokens": 65536, "shapes": [[1, 128]]}


def branches(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """The stages of each branch after the teacher. `tree`: the teacher's resolved recipe."""
    layers = tree["model"]["num_layers"] - tree["model"]["num_layers"] // 6
    fewer = model_parameters(ModelConfig.model_validate(tree["model"] | {"num_layers": layers}), tree["tokenizer"]["vocab_size"])
    return {
        "magnitude-50": [{"prune": {"method": "magnitude", "sparsity": 0.5}}],
        "wanda-50": [{"prune": {"method": "wanda", "sparsity": 0.5}}, "distill"],
        "sparsegpt-50": [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}],
        "width-85": [{"prune": {"method": "width", "target_parameters": 0.85}}, "distill"],
        f"depth-{layers}": [{"prune": {"method": "depth", "num_layers": layers}}, "distill", {"quantize": {"scheme": "w8a8"}}],
        f"width-as-depth-{layers}": [{"prune": {"method": "width", "target_parameters": fewer}}, "distill"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="where the branches go")
    parser.add_argument("--only", default="", help="branches whose name holds this")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    tree = yaml.safe_load((given.run / "pretrain" / "config.yaml").read_text())
    rows: list[tuple[str, dict[str, Any]]] = []
    for name, stages in branches(tree).items():
        if given.only in name:
            _run(given.run, given.keep / name, {**tree}, stages, given.overrides)
            rows += [(name, row) for row in json.loads((given.keep / name / "quality.json").read_text())]
    print("| branch | model | parameters | perplexity | change | KL | top-1 | zeros |\n|---|---|---|---|---|---|---|---|")
    for name, row in rows:
        zeros = "" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
        print(
            f"| {name} | {row['name']} | {row['parameters'] / 1e6:.2f}M | {row['perplexity']:.4f} | {row['perplexity_increase']:+.2%} "
            f"| {row['kl']:.4f} | {row['top1_agreement']:.2%} | {zeros} |"
        )


def _run(teacher: Path, folder: Path, tree: dict[str, Any], stages: list[Any], overrides: list[str]) -> None:
    for stage in ("prepare", "pretrain"):
        if not (folder / stage).exists():
            shutil.copytree(teacher / stage, folder / stage)
    tree["run"] = tree["run"] | {"name": folder.name, "output_dir": str(folder), "stages": ["prepare", "pretrain", *stages]}
    tree |= {"distill": DISTILL, "quality": QUALITY, "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False}}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    subprocess.run([sys.executable, "-m", "largeformer", "run", "-c", str(recipe), *overrides], check=True)


if __name__ == "__main__":
    main()
