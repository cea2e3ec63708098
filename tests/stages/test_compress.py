"""The shipped recipe `compress` in short: the same chain on the same text, with a teacher that has hardly learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.stages.test_end_to_end import start

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.slow

SHORT = [
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.seq_length=128",
    "train={micro_batch_size: 8, global_batch_size: 8, train_iters: 60, eval_interval: 60, eval_iters: 2}",
    "optimizer.lr_decay_iters=60",
    "optimizer.lr_wsd_decay_iters=20",
    "optimizer.lr_warmup_iters=10",
    "prune.calibration={samples: 16}",
    "distill.train={train_iters: 30, eval_interval: 30}",
    "distill.optimizer.lr_warmup_iters=10",
    "export.gate_tokens=4096",
    "quality.tokens=4096",
    "quality.rounds=2",
]


def test_the_recipe_in_short(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = start("run", "-c", "compress", f"run.output_dir={run}", *SHORT, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = {row["name"]: row for row in json.loads((run / "quality.json").read_text())}
    assert {"pretrain", "prune", "distill", "quantize", "export/hf", "export/hf-int8"} <= rows.keys()
    assert all(row["passed"] for row in rows.values())
    assert 0.8 < rows["distill"]["parameters"] / rows["pretrain"]["parameters"] <= 0.85
    assert rows["distill"]["perplexity"] < rows["prune"]["perplexity"]
    assert rows["quantize"]["bytes"] < 0.85 * rows["distill"]["bytes"], "embeddings, two thirds of so small a model, stay bf16"
    assert rows["export/onnx/model_int8"]["bytes"] < 0.3 * rows["export/onnx/model"]["bytes"]
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "export" / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export" / "hf")
    assert model.config.num_hidden_layers == 4 and model.config.intermediate_size % 8 == 0
    assert tokenizer.decode(tokenizer("def main():")["input_ids"], skip_special_tokens=True) == "def main():"
