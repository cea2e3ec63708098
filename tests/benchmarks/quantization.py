"""What integers cost a trained model: `python -m tests.benchmarks.quantization FOLDER [--from RUN] [--steps N]`.

Trains a small Llama on the built-in corpus in FOLDER, or takes that of a run; then quantizes it by each scheme and method, and prints
perplexity before and after on the test split, computed as the integers' clients do. What is finished in FOLDER is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from largeformer import cli

SETTINGS: dict[str, list[str]] = {
    "W8A8, a scale for each token": ["quantize.scheme=w8a8"],
    "W8A8, SmoothQuant": ["quantize.scheme=w8a8", "quantize.smoothquant={alpha: 0.5}"],
    "W8A8 static": ["quantize.scheme=w8a8_static"],
    "W8A8 static, percentile": ["quantize.scheme=w8a8_static", "quantize.observer=percentile"],
    "W8A8 static, mse": ["quantize.scheme=w8a8_static", "quantize.observer=mse"],
    "W8A8 static, SmoothQuant": ["quantize.scheme=w8a8_static", "quantize.smoothquant={alpha: 0.5}"],
    "W8A16": ["quantize.scheme=w8a16"],
    "W4A16, to nearest": ["quantize.scheme=w4a16"],
    "W4A16, to nearest, mse": ["quantize.scheme=w4a16", "quantize.weight_observer=mse"],
    "W4A16, GPTQ": ["quantize.scheme=w4a16", "quantize.method=gptq"],
    "W4A16, GPTQ, largest first": ["quantize.scheme=w4a16", "quantize.method=gptq", "quantize.gptq={act_order: true}"],
    "W4A16, QAT": [
        "quantize.scheme=w4a16",
        "quantize.method=qat",
        "quantize.train={train_iters: 100, eval_interval: 100}",
        "quantize.optimizer={lr: 3.0e-4, min_lr: 3.0e-5, lr_warmup_iters: 5}",
    ],
}


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
        "quantize": {"error_threshold": 10.0, "evaluation_tokens": 65536},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="source", type=Path, default=None, help="a run whose model is quantized")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", default="", help="settings whose name holds this")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.source is None:
        path = arguments.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(arguments.folder, arguments.steps)))
        assert cli.main(["run", "-c", str(path)]) == 0
    source = arguments.source or arguments.folder / "run"
    rows = {}
    for number, (name, overrides) in enumerate(SETTINGS.items()):
        if arguments.only in name:
            output = arguments.folder / str(number)
            assert cli.main(["quantize", "--from", str(source), f"run.output_dir={output}", *overrides]) == 0
            rows[name] = json.loads((output / "quantize" / "manifest.json").read_text())["metrics"]
    print("| | perplexity | change | KL | top-1 | mean error of a layer's output |\n|---|---|---|---|---|---|")
    for name, found in rows.items():
        print(
            f"| {name} | {found['perplexity_before']:.4f} -> {found['perplexity']:.4f} | {found['perplexity_increase']:+.3%} "
            f"| {found['kl']:.2e} | {found['top1_agreement']:.2%} | {found['mean_error']:.2%} |"
        )


if __name__ == "__main__":
    main()
