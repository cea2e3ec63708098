"""What a finished `prune` or `quantize` is not taken for: one of another text, another precision, or without its checkpoint; and models
that are not finite."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from largeformer import cli
from largeformer.artifact import read_status
from largeformer.checkpoint.commit import newest
from largeformer.compression.quantization.description import Description
from largeformer.export.streaming import StoredTensors
from tests.recipes import python_sources
from tests.stages.test_prune import write_recipe

STAGES = {
    "prune": ["prune.method=wanda"],
    "quantize": ["quantize.scheme=w8a8", "quantize.calibration.samples=4", "quantize.evaluation_tokens=128"],
}
FIT = ["prune.ffn_hidden_size=64"]
Command = Callable[..., int]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stale")
    assert cli.main(["run", "-c", str(write_recipe(folder, train={"train_iters": 1, "eval_interval": 1}))]) == 0
    return folder


@pytest.fixture
def command(trained: Path, tmp_path: Path) -> Command:
    """`command(stage, *overrides)` on a copy of the run."""
    shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    recipe = str(trained / "recipe.yaml")
    return lambda stage, *overrides: cli.main([stage, "-c", recipe, f"run.output_dir={tmp_path / 'run'}", *overrides])


def made_at(stage: Path) -> int:
    return (stage / "manifest.json").stat().st_mtime_ns


def dtypes(stage: Path) -> set[torch.dtype]:
    checkpoint = newest(stage / "checkpoints")
    assert checkpoint is not None
    stored = StoredTensors.of_checkpoint(checkpoint)
    return {stored.dtype(name) for name in stored.names}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_its_checkpoints_is_made_anew(
    command: Command, tmp_path: Path, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run" / stage
    assert command(stage, *STAGES[stage]) == 0
    before = made_at(folder)
    shutil.rmtree(folder / "checkpoints")
    assert command("export", *STAGES[stage], f"run.stages=[prepare, pretrain, {stage}, export]", "export.formats=[hf]") == 2
    assert f"{folder} has finished, and its checkpoints are gone" in capfd.readouterr().err
    assert command(stage, *STAGES[stage]) == 0
    assert made_at(folder) != before and dtypes(folder) == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_another_precision_is_another_result(command: Command, tmp_path: Path, stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(stage, *STAGES[stage]) == 0
    half = [*STAGES[stage], f"{stage}.train.precision=bf16"]
    assert command(stage, *half) == 2
    assert "train.precision was fp32, is bf16" in capfd.readouterr().err
    assert command(stage, *half, "--fresh") == 0
    assert dtypes(tmp_path / "run" / stage) == {torch.bfloat16}


@pytest.mark.parametrize("stage", STAGES)
def test_another_text_of_the_same_name_is_another_calibration(
    command: Command, tmp_path: Path, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run" / stage
    settings = [*STAGES[stage], f"{stage}.calibration.text={text}"]
    text.write_text(Path(json.__file__).read_text())
    assert command(stage, *settings) == 0
    before = made_at(folder)
    assert command(stage, *settings) == 0 and made_at(folder) == before
    text.write_text(Path(json.decoder.__file__).read_text())
    assert command(stage, *settings) == 2
    assert "calibration_text was" in capfd.readouterr().err
    assert command(stage, *settings, "--fresh") == 0 and made_at(folder) != before


def test_what_was_fitted_keeps_the_precision_of_its_checkpoint(command: Command, tmp_path: Path) -> None:
    """Though the model that text went through was narrower."""
    assert command("prune", *FIT, "prune.train.precision=bf16") == 0
    checkpoint = newest(tmp_path / "run" / "prune" / "checkpoints")
    assert checkpoint is not None
    fitted = StoredTensors.of_checkpoint(checkpoint).read("decoder.layers.0.mlp.linear_fc2.weight")
    assert fitted.dtype is torch.float32 and (fitted != fitted.bfloat16().float()).float().mean() > 0.9


NOT_FINITE = {
    "width, fitted": ("prune", FIT),
    "width by weights": ("prune", [*FIT, "prune.importance=weight", "prune.reconstruct=false"]),
    "depth": ("prune", ["prune.method=depth", "prune.num_layers=3"]),
    "threshold": ("prune", ["prune.method=magnitude", "prune.threshold=0.001", "prune.sparsity=null"]),
    "weights alone": ("quantize", ["quantize.scheme=w8a16", *STAGES["quantize"][1:]]),
    "trained, smoothed": (
        "quantize",
        [*STAGES["quantize"], "quantize.method=qat", "quantize.smoothquant={alpha: 0.5}", "quantize.train={train_iters: 1}"],
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_model_that_is_not_finite_is_refused(
    command: Command, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stage, settings = NOT_FINITE[case]
    assert command(stage, *STAGES[stage]) == 0
    before = made_at(tmp_path / "run" / stage)
    not_finite(monkeypatch)
    assert command(stage, *settings, "--fresh") == 2
    error = capfd.readouterr().err
    assert "not finite" in error and "Traceback" not in error
    assert made_at(tmp_path / "run" / stage) == before


def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever checkpoint is loaded has a last norm that is no number."""
    from largeformer.training import checkpointing

    load = checkpointing.load_weights

    def loaded(checkpoint: Path, shards: Any, *further: Any) -> Any:
        found = load(checkpoint, shards, *further)
        for shard in shards:
            if shard.key == "decoder.final_layernorm.weight":
                shard.parameter.data[0] = math.nan
        return found

    monkeypatch.setattr(checkpointing, "load_weights", loaded)


def test_a_training_with_rounding_that_was_stopped_before_its_figures_goes_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*STAGES["quantize"], "quantize.method=qat", "quantize.train={train_iters: 1, eval_interval: 1}"]
    write = Description.write

    def stopped(description: Description, folder: Path) -> None:
        write(description, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(Description, "write", stopped)
    assert command("quantize", *settings) == 130
    monkeypatch.undo()
    manifest = tmp_path / "run" / "quantize" / "manifest.json"
    assert "perplexity" not in json.loads(manifest.read_text())["metrics"]
    assert command("quantize", *settings) == 0
    assert json.loads(manifest.read_text())["metrics"]["perplexity"] > 1


def test_a_chain_that_begins_with_a_trained_run_wants_its_test_split(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = str(write_recipe(tmp_path, train={"train_iters": 1, "eval_interval": 1}, data={"sources": python_sources("email")[:2]}))
    assert cli.main(["run", "-c", recipe]) == 0
    assert cli.main(["run", "-c", recipe, "run.stages=[prune]"]) == 2
    assert "leaves the test split without a document" in capfd.readouterr().err and not (tmp_path / "run" / "prune").exists()


def test_a_chain_that_begins_with_a_trained_run_is_judged(command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    quick = ["quality.tokens=64", "quality.shapes=[[1, 1]]", "quality.rounds=1", "quality.limits={p: {max_kl: 1.0e-9}}"]
    entry = "{prune: {name: p, method: wanda, train: {precision: bf16}}}"
    assert command("run", f"run.stages=[{entry}]", *quick) == 1
    status = read_status(run)
    assert status is not None and (status["stage"], status["status"]) == ("p", "failed")
    (row,) = json.loads((run / "quality.json").read_text())
    checkpoint = newest(run / "p" / "checkpoints")
    assert row["name"] == "p" and checkpoint is not None and row["beside"] == "pretrain"
    stored = StoredTensors.of_checkpoint(checkpoint)
    assert row["bytes"] == sum(stored.read(name).nbytes for name in stored.names)
    assert yaml.safe_load((checkpoint / "config.yaml").read_text())["train"]["precision"] == "bf16"
