"""The whole chain in small: text to a pruned, distilled, quantized, exported model; what is done is not done again, and only that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer.artifact import Artifact
from largeformer.stages.lineage import nodes
from tests.recipes import TINY
from tests.stages.test_end_to_end import start, status

pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.slow
CHAIN = ["prepare", "pretrain", "prune", "distill", "quantize", "export", "evaluate"]
MODELS = ["pretrain", "prune", "distill", "quantize"]


def write_recipe(folder: Path) -> Path:
    source = str(Path(json.__file__).parent.parent / "email" / "*.py")
    training = {"micro_batch_size": 4, "global_batch_size": 8, "train_iters": 30, "eval_interval": 30, "eval_iters": 1}
    tree: dict[str, Any] = {
        **TINY,
        "model": {**TINY["model"], "seq_length": 64, "ffn_hidden_size": 128},
        "run": {"name": "chain", "output_dir": str(folder / "run"), "stages": CHAIN},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": [{"path": source}], "split": "80,10,10"},
        "train": {**TINY["train"], **training},
        "optimizer": {"lr": 3.0e-3},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
        "prune": {"method": "width", "target_parameters": 0.85, "axes": ["ffn_hidden_size"], "calibration": {"samples": 8}},
        "distill": {"train": {"train_iters": 20, "eval_interval": 20}, "optimizer": {"lr": 1.0e-3}},
        "quantize": {"scheme": "w8a8", "calibration": {"samples": 4}},
        "export": {"formats": ["hf", "hf-int8"], "gate_tokens": 512},
        "quality": {"tokens": 512, "shapes": [[1, 1], [2, 16]], "rounds": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def identities(run: Path) -> dict[str, str]:
    return {node.name: node.artifact.identity for node in nodes(run)}


def written_at(run: Path) -> dict[str, int]:
    return {node.name: (node.artifact.path / "manifest.json").stat().st_mtime_ns for node in nodes(run)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("chain"))
    done = start("run", "-c", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(name in done.stdout for name in ("export/hf-int8", "quality:", "bits/byte")), done.stdout
    return path


def test_every_stage_says_what_it_is_worth(recipe: Path) -> None:
    run = recipe.parent / "run"
    assert list(identities(run)) == ["prepare", "pretrain", "prune", "distill", "quantize", "evaluate", "export"]
    rows = {row["name"]: row for row in json.loads((run / "quality.json").read_text())}
    assert list(rows) == [*MODELS, "export/hf", "export/hf-int8"]
    assert rows["pretrain"]["kl"] == 0.0 and rows["pretrain"]["top1_agreement"] == 1.0
    assert all(rows[name]["kl"] > 0.0 for name in MODELS[1:])
    assert rows["prune"]["parameters"] == rows["distill"]["parameters"] < 0.9 * rows["pretrain"]["parameters"]
    assert rows["distill"]["perplexity"] < rows["prune"]["perplexity"], "it has learnt"
    assert rows["quantize"]["perplexity"] == pytest.approx(rows["distill"]["perplexity"], rel=0.02)
    assert rows["quantize"]["perplexity"] != rows["distill"]["perplexity"], "it is rounded"
    assert rows["export/hf-int8"]["bytes"] < 0.6 * rows["export/hf"]["bytes"]
    assert rows["export/hf"]["beside"] == "quantize, as floats", "which rounding to nearest has left as they were"
    for figure in ("increase_from_first", "bits_per_byte"):
        assert rows["export/hf"][figure] == pytest.approx(rows["distill"][figure], rel=1e-4)
    for name in MODELS:
        quality = Artifact.read(run / name)
        assert quality is not None and quality.metrics["quality"]["passed"]
        assert [row["shape"] for row in quality.metrics["quality"]["latency"]] == ["1x1 after 32", "2x16"]
    assert (run / "quality.svg").read_text().count("<circle") == len(rows)


def test_two_ranks_find_the_same(recipe: Path, tmp_path: Path) -> None:
    """The whole chain anew, each model and its measures split over them."""
    one, two = recipe.parent / "run", tmp_path / "run"
    layout = [f"run.output_dir={two}", "parallel.tensor_model_parallel_size=2"]
    done = start("run", "-c", str(recipe), *layout, ranks=2, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("distill: perplexity") == 1, "one rank speaks"
    ours, theirs = ({row["name"]: row for row in json.loads((run / "quality.json").read_text())} for run in (two, one))
    assert list(ours) == list(theirs)
    same = ("parameters", "beside", "passed")
    for name, row in theirs.items():
        assert {key: ours[name][key] for key in same} == {key: row[key] for key in same}
        assert ours[name]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-3), name
        assert ours[name]["bits_per_byte"] == pytest.approx(row["bits_per_byte"], rel=2e-4), name
        assert ours[name]["kl"] == pytest.approx(row["kl"], rel=0.01, abs=1e-5), name
        assert ours[name]["top1_agreement"] == pytest.approx(row["top1_agreement"], abs=0.01), name
    found, expected = (Artifact.read(run / "evaluate") for run in (two, one))
    assert found is not None and expected is not None
    assert found.metrics["tokens"] == expected.metrics["tokens"]
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)


def test_only_what_depends_on_a_change_is_done_again(recipe: Path) -> None:
    run = recipe.parent / "run"
    before, times = identities(run), written_at(run)
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    assert written_at(run) == times, "nothing had changed"

    # A checkpoint that is not what was written is made anew, and with it nothing else, since it comes out the same.
    (weights,) = (run / "prune" / "checkpoints" / "step_00000000" / "weights").iterdir()
    weights.write_bytes(weights.read_bytes()[:-8])
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"the checkpoint in {run / 'prune'} is damaged" in done.stdout and "quantize is damaged" not in done.stdout
    changed = {name for name, time in written_at(run).items() if time != times[name]}
    assert changed == {"prune"} and identities(run) == before

    times = written_at(run)
    done = start("run", "-c", str(recipe), "quantize.scheme=w8a16")
    assert done.returncode == 0, done.stderr[-3000:]
    after = identities(run)
    assert {name for name in before if after[name] != before[name]} == {"quantize", "export", "evaluate"}
    assert {name for name, time in written_at(run).items() if time != times[name]} == {"quantize", "export", "evaluate"}
    assert (run / "quantize.old-1").is_dir() and (run / "export.old-1").is_dir()


def test_a_stage_beyond_its_limits_fails_and_is_not_gone_on_from(recipe: Path) -> None:
    run = recipe.parent / "run"
    done = start("run", "-c", str(recipe), "quantize.scheme=w8a16", "quality.limits={prune: {max_kl: 1.0e-9}}")
    assert done.returncode == 1 and "prune: kl is" in done.stderr, done.stderr[-3000:]
    assert status(run) == "failed" and "prune" not in identities(run)
    done = start("distill", "-c", str(recipe), "--fresh")
    assert done.returncode == 2 and "prune has left checkpoints but has not finished" in done.stderr, done.stderr[-3000:]
