"""What pruning costs a trained model, before and after distillation: `python -m tests.benchmarks.pruning RUN --keep FOLDER [--only NAME]`.

RUN: the run folder of a trained teacher (prepare, pretrain). Each branch is a run of its own in FOLDER that begins with a copy of it; what
is finished there is not done again. Further arguments change the recipe, such as `distill.train={train_iters: 200}`. The table is
that of `quality`, over the test split, with the validation loss of what was trained. A branch that fails leaves the others alone, and ends
with its exit code.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from largeformer.config.schema import ModelConfig
from largeformer.config.size import model_parameters
from tests.benchmarks.chains import COURSE, run_chain, teacher_recipe

FFN = {"axes": ["ffn_hidden_size"]}
ORDER = ("pretrain", "prune", "distill", "quantize")


def branches(tree: dict[str, Any]) -> dict[str, list[Any]]:
    """The stages of each branch after the teacher. `tree`: the teacher's resolved recipe."""
    layers = tree["model"]["num_layers"] - tree["model"]["num_layers"] // 6
    fewer = model_parameters(ModelConfig.model_validate(tree["model"] | {"num_layers": layers}), tree["tokenizer"]["vocab_size"])
    return {
        "magnitude-50": [{"prune": {"method": "magnitude", "sparsity": 0.5}}],
        "wanda-50": [{"prune": {"method": "wanda", "sparsity": 0.5}}, "distill"],
        "sparsegpt-50": [{"prune": {"method": "sparsegpt", "sparsity": 0.5}}],
        "width-85": [{"prune": {"method": "width", "target_parameters": 0.85}}, "distill"],
        "ffn-85": [{"prune": {"method": "width", "target_parameters": 0.85, **FFN}}, "distill"],
        f"depth-{layers}": [{"prune": {"method": "depth", "num_layers": layers}}, "distill", {"quantize": {"scheme": "w8a8"}}],
        f"width-as-depth-{layers}": [{"prune": {"method": "width", "target_parameters": fewer}}, "distill"],
        f"ffn-as-depth-{layers}": [{"prune": {"method": "width", "target_parameters": fewer, **FFN}}, "distill"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="where the branches go")
    parser.add_argument("--only", default="", help="branches whose name begins with this")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    tree = teacher_recipe(given.run)
    rows: list[tuple[str, str, dict[str, Any]]] = []
    codes = []
    for name, stages in branches(tree).items():
        if name.startswith(given.only):
            folder = (given.keep / name).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            sections = {"distill": {"teacher": "pretrain", **COURSE}}
            found, code = run_chain(given.run, folder, ["prepare", "pretrain"], stages, sections, given.overrides)
            codes.append(code)
            rows += [(name, stage, found[stage]) for stage in ORDER if stage in found]
    print("| branch | model | parameters | perplexity | change | KL | top-1 | zeros | validation |\n" + "|---" * 9 + "|")
    for name, stage, row in rows:
        zeros = "" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
        valid = "" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
        print(
            f"| {name} | {stage} | {row['parameters'] / 1e6:.2f}M | {row['perplexity']:.4f} | {row['perplexity_increase']:+.2%} "
            f"| {row['kl']:.4f} | {row['top1_agreement']:.2%} | {zeros} | {valid} |"
        )
    return max(codes, default=2)


if __name__ == "__main__":
    sys.exit(main())
