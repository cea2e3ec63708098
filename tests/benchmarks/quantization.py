"""What integers cost a trained model: `python -m tests.benchmarks.quantization FOLDER [--from RUN] [section.key=value ...]`.

Trains a small Llama on the built-in corpus in FOLDER, or takes that of a run; then quantizes it by each scheme and method, every layer, and
tells perplexity before and after on the test split, computed as the integers' clients do. Training with rounding has two controls: the same
further steps without, as floats, and these rounded to nearest. FOLDER/quantization.json and .md hold all rows, a failed one too; what is
finished in FOLDER is not done again. Exit code 1 where a setting failed.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from largeformer.checkpoint.commit import candidates
from largeformer.config.schema import ModelConfig
from largeformer.models.hf_mapping import rows

QUIET = ["tracking.wandb.mode=disabled", "tracking.tensorboard=false"]
# The source's own chain may say how it quantizes: each setting here says so itself.
PLAIN = ["run.stages=[prepare, pretrain, quantize]", "quality.limits={}"]
KEPT = ("perplexity_before", "perplexity", "perplexity_increase", "kl", "top1_agreement", "mean_error", "integer_layers", "tokens")


@dataclass(frozen=True)
class Setting:
    """One row. folder: its name in FOLDER; after: the folder of the setting whose model it starts from, in place of the given one."""

    folder: str
    name: str
    overrides: list[str]
    after: str | None = None


@dataclass
class Row:
    """What came of a setting: figures of its manifest, or `failed`, why there are none."""

    name: str
    overrides: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


def settings(model: ModelConfig, steps: int) -> Iterator[Setting]:
    static, four = ["quantize.scheme=w8a8_static"], ["quantize.scheme=w4a16", f"quantize.group_size={group_size(model)}"]
    smooth, gptq = ["quantize.smoothquant={alpha: 0.5}"], [*four, "quantize.method=gptq"]
    yield Setting("w8a8", "W8A8, a scale for each token", ["quantize.scheme=w8a8"])
    yield Setting("w8a8-smooth", "W8A8, SmoothQuant", ["quantize.scheme=w8a8", *smooth])
    for observer in ("minmax", "percentile", "mse"):
        yield Setting(f"static-{observer}", f"W8A8 static, {observer}", [*static, f"quantize.observer={observer}"])
    yield Setting("static-smooth", "W8A8 static, mse, SmoothQuant", [*static, "quantize.observer=mse", *smooth])
    yield Setting("w8a16", "W8A16", ["quantize.scheme=w8a16"])
    yield Setting("w4a16", "W4A16, to nearest", four)
    yield Setting("w4a16-mse", "W4A16, to nearest, mse", [*four, "quantize.weight_observer=mse"])
    yield Setting("gptq", "W4A16, GPTQ", gptq)
    yield Setting("gptq-order", "W4A16, GPTQ, largest first", [*gptq, "quantize.gptq={act_order: true}"])
    train = [
        "quantize.method=qat",
        f"quantize.train={{train_iters: {steps}, eval_interval: {steps}, early_stopping: null}}",
        "quantize.optimizer={lr: 3.0e-4, min_lr: 3.0e-5, lr_decay_style: cosine, lr_decay_iters: null, lr_wsd_decay_iters: null, "
        f"lr_warmup_iters: {min(5, steps // 2)}}}",
    ]
    yield Setting("qat", f"W4A16, QAT, {steps} steps", [*four, *train])
    yield Setting("qat-taught", f"W4A16, QAT, {steps} steps, taught by the floats", [*four, *train, "quantize.distill={alpha: 1.0}"])
    every = f"quantize.keep_float=[{', '.join(layers(model))}]"
    yield Setting("floats", f"floats, the same {steps} steps without rounding", [*four, *train, every])
    yield Setting(
        "floats-w4a16",
        f"W4A16, to nearest, after {steps} steps without rounding",
        [*four, "quantize.method=rtn", "quantize.keep_float=[]"],
        after="floats",
    )


def group_size(model: ModelConfig) -> int:
    """The largest power of two up to 128 that divides the inputs of every layer."""
    return math.gcd(128, model.hidden_size, model.ffn_size, model.num_attention_heads * model.head_dim)


def layers(model: ModelConfig) -> list[str]:
    """All linear layers, by the names that `quantize.keep_float` takes."""
    return [name.removesuffix(".weight") for row in rows(model, "llama") for name in row.theirs if name.endswith("_proj.weight")]


def chosen(every: Sequence[Setting], only: str) -> list[Setting]:
    """Those whose name holds `only`, and what they start from."""
    wanted = [setting for setting in every if only in setting.name]
    needed = {setting.after for setting in wanted}
    return [setting for setting in every if setting in wanted or setting.folder in needed]


def measure(setting: Setting, source: Path, folder: Path, further: Sequence[str]) -> Row:
    """Quantize in a process of its own, whose end, whatever it is, leaves the others alone."""
    output = folder / setting.folder
    output.mkdir(parents=True, exist_ok=True)
    if setting.after is not None:
        source = folder / setting.after / "quantize"
    overrides = [*QUIET, *PLAIN, "quantize.error_threshold=10.0", "quantize.evaluation_tokens=65536", *setting.overrides, *further]
    command = ["quantize", "--from", str(source), f"run.output_dir={output}", *overrides]
    done = subprocess.run([sys.executable, "-m", "largeformer", *command], stderr=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stderr)
    row = Row(setting.name, overrides)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        row.failed = f"exit code {done.returncode}: {said[-1].strip() if said else 'no reason given'}"
        return row
    metrics = json.loads((output / "quantize" / "manifest.json").read_text())["metrics"]
    row.figures = {**{name: metrics[name] for name in KEPT}, "float_layers": len(metrics["float_layers"])}
    return row


def table(found: Sequence[Row]) -> str:
    lines = [
        "| | perplexity | change | KL | top-1 | mean error of a layer's output | layers left in floats |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found:
        if row.failed is not None:
            lines.append(f"| {row.name} | failed: {row.failed.replace('|', '/')} | | | | | |")
            continue
        of = row.figures
        error = "-" if of["mean_error"] is None else f"{of['mean_error']:.2%}"
        lines.append(
            f"| {row.name} | {of['perplexity_before']:.4f} -> {of['perplexity']:.4f} | {of['perplexity_increase']:+.3%} | {of['kl']:.2e} "
            f"| {of['top1_agreement']:.2%} | {error} | {of['float_layers']} of {of['float_layers'] + of['integer_layers']} |"
        )
    return "\n".join(lines) + "\n"


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "run": {"name": "quantization", "output_dir": str(folder / "run"), "stages": ["prepare", "pretrain"]},
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "ffn_hidden_size": 384,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "seq_length": 128,
        },
        "tokenizer": {"vocab_size": 1024},
        "data": {"sources": [{"path": "python-docs"}], "split": "98,1,1"},
        "train": {"precision": "fp32", "micro_batch_size": 16, "global_batch_size": 16, "train_iters": steps, "log_interval": 50},
        "optimizer": {"lr": 4.0e-3, "min_lr": 1.0e-4},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="a run, or a stage of one, whose model is quantized")
    parser.add_argument("--steps", type=int, default=800, help="of the small Llama")
    parser.add_argument("--further", type=int, default=100, help="steps with rounding, and of the controls")
    parser.add_argument("--only", default="", help="settings whose name holds this, and what they start from")
    parser.add_argument("overrides", nargs="*", help="for every setting, such as quantize.calibration.samples=512")
    given = parser.parse_intermixed_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    source = given.source.resolve() if given.source is not None else folder / "run" / "pretrain"
    if given.source is None:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(folder, given.steps)))
        subprocess.run([sys.executable, "-m", "largeformer", "run", "-c", str(path)], check=True)
    source = source / "pretrain" if (source / "pretrain").is_dir() else source
    tree = yaml.safe_load((candidates(source)[0] / "config.yaml").read_text())
    found: list[Row] = []
    for setting in chosen(list(settings(ModelConfig.model_validate(tree["model"]), given.further)), given.only):
        own = folder / setting.folder / "prepare"  # what starts from this one's model finds the text beside it
        own.parent.mkdir(exist_ok=True)
        if not own.is_symlink():
            own.symlink_to((source.parent / "prepare").resolve())
        found.append(measure(setting, source, folder, given.overrides))
        print(table(found[-1:]).splitlines()[-1], flush=True)
        (folder / "quantization.json").write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
        (folder / "quantization.md").write_text(table(found))
    print(f"\n{table(found)}")
    return 1 if any(row.failed for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
