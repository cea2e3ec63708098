"""Pruned weights stay 0 in every later stage, to the very integers; one that comes back fails the stage that has lost it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from largeformer import cli
from largeformer.compression.pruning.sparsity import count_zeros, zeros_lost
from largeformer.export.streaming import StoredTensors
from largeformer.training.rewind import read_rewinds
from tests.recipes import TINY

STEPS = 2
LOST = "pruned weights are not 0 any more"


def write_recipe(folder: Path, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        **TINY,
        "model": {**TINY["model"], "num_layers": 2},
        "run": {"name": "tiny", "output_dir": str(folder / "run"), "stages": ["prepare", "pretrain"]},
        "train": {**TINY["train"], "train_iters": STEPS, "eval_interval": STEPS, "eval_iters": 1},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
        "prune": {"method": "magnitude", "pattern": "2:4"},
        "quantize": {"scheme": "w4a16", "group_size": 16, "symmetric": False, "calibration": {"samples": 2}, "evaluation_tokens": 64},
        "export": {"formats": ["hf", "hf-int8", "largeformer"], "gate_tokens": 64},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model was trained, and pruned to two of four."""
    folder = tmp_path_factory.mktemp("zeros")
    recipe = str(write_recipe(folder))
    assert cli.main(["run", "-c", recipe]) == 0
    assert cli.main(["prune", "-c", recipe]) == 0
    return folder / "run"


@pytest.fixture
def copy(pruned: Path, tmp_path: Path) -> Path:
    shutil.copytree(pruned, tmp_path / "run", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "run"


def metrics(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())["metrics"]  # type: ignore[no-any-return]


def stored(run: Path, stage: str) -> StoredTensors:
    checkpoints = run / stage / "checkpoints"
    return StoredTensors.of_checkpoint(checkpoints / (checkpoints / "latest").read_text().strip())


def test_the_integers_of_a_stage_are_what_is_counted(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from largeformer.compression.quantization import layers

    quantize = ["quantize", "-c", str(write_recipe(copy.parent)), "--from", str(copy / "prune")]
    assert cli.main(quantize) == 0
    sparsity, floats = metrics(copy, "quantize")["sparsity"], count_zeros(stored(copy, "quantize"))
    assert sparsity["zeros"] > sum(count.zeros for count in floats.values()), "some more are rounded to 0"
    original = layers.weight_scales

    def between(*arguments: Any) -> Any:
        given = original(*arguments)
        given.zero_point.add_(0.25)
        return given

    monkeypatch.setattr(layers, "weight_scales", between)
    assert cli.main([*quantize, "--fresh", "quantize.group_size=32"]) == 1
    assert LOST in capfd.readouterr().err
    assert not (copy / "quantize" / "manifest.json").exists()


def one_float(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    weight[(weight == 0).nonzero()[0]] = 1.0e-12


def one_integer(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"].view(-1)
    weight[(weight == 0).nonzero()[0]] = 1


HARM: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None]]] = {"floats": ("hf", one_float), "integers": ("hf-int8", one_integer)}


def test_an_export_says_how_sparse_it_is(copy: Path) -> None:
    assert cli.main(["export", "-c", str(write_recipe(copy.parent)), "--from", str(copy / "prune")]) == 0
    found, source = metrics(copy, "export"), metrics(copy, "prune")["sparsity"]
    assert found["sparsity"]["zeros"] == source["zeros"]
    assert found["formats"]["hf"]["sparsity"]["model"] == {"zeros": source["zeros"], "weights": source["weights"]}
    assert found["formats"]["largeformer"]["sparsity"] == found["formats"]["hf"]["sparsity"]
    assert found["formats"]["hf-int8"]["sparsity"]["model"]["zeros"] >= source["zeros"]


def test_zeros_of_a_model_that_was_never_pruned_are_told_of_nowhere(copy: Path) -> None:
    """Whose rounded weights are often 0."""
    recipe = str(write_recipe(copy.parent, export={"formats": ["largeformer"]}))
    assert cli.main(["quantize", "-c", recipe, "--from", str(copy / "pretrain"), "quantize.method=gptq"]) == 0
    assert any(count.zeros for count in count_zeros(stored(copy, "quantize")).values())
    assert cli.main(["export", "-c", recipe, "--from", str(copy / "quantize")]) == 0
    found = metrics(copy, "export")
    assert "sparsity" not in found and "sparsity" not in found["formats"]["largeformer"]


@pytest.mark.parametrize(("name", "harm"), HARM.values(), ids=HARM)
def test_an_export_that_has_lost_a_zero_fails(
    name: str,
    harm: Callable[[dict[str, torch.Tensor]], None],
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One weight, by so little that the gate does not see it."""
    from largeformer.export import formats

    original = formats.write_weights

    def write(*arguments: Any) -> int:
        size, path = original(*arguments), arguments[4] / "model.safetensors"
        tensors = load_file(path)
        harm(tensors)
        save_file(tensors, path, {"format": "pt"})
        return size

    monkeypatch.setattr(formats, "write_weights", write)
    recipe = str(write_recipe(copy.parent, export={"formats": [name]}))
    assert cli.main(["export", "-c", recipe, "--from", str(copy / "prune")]) == 1
    error = capfd.readouterr().err
    assert f"{name}: model: 1 {LOST}" in error and "kl is" not in error and "logit_difference is" not in error
    assert not (copy / "export" / "manifest.json").exists()


@pytest.mark.slow
def test_onnx_files_say_it_too(copy: Path) -> None:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    recipe = str(write_recipe(copy.parent, export={"formats": ["onnx"]}))
    assert cli.main(["export", "-c", recipe, "--from", str(copy / "prune")]) == 0
    zeros, found = metrics(copy, "prune")["sparsity"]["zeros"], metrics(copy, "export")["formats"]["onnx"]["sparsity"]
    assert found["model"]["zeros"] == zeros and found["model_int8"]["zeros"] >= zeros


WHERE = {"all there": False, "the pruned model gone meanwhile": True}


@pytest.mark.parametrize("gone", WHERE.values(), ids=WHERE)
def test_training_that_goes_on_from_a_pruned_model_holds_its_zeros(copy: Path, tmp_path: Path, gone: bool) -> None:
    """Also where it is stopped and gone on with, by another run before it has finished."""
    recipe = str(write_recipe(tmp_path / "tuned", checkpoint={"load": str(copy / "prune"), "save_interval": 1}))
    assert cli.main(["pretrain", "-c", recipe, "train.exit_iteration=1"]) == 0
    again = write_recipe(tmp_path / "again", checkpoint={"load": str(tmp_path / "tuned" / "run")})
    assert cli.main(["pretrain", "-c", str(again)]) == 0
    before = (copy / "prune").rename(copy / "elsewhere") if gone else copy / "prune"
    assert cli.main(["pretrain", "-c", recipe]) == 0
    for run in (tmp_path / "tuned" / "run", tmp_path / "again" / "run"):
        tuned, masked = stored(run, "pretrain"), stored(copy, before.name)
        assert not dict(zeros_lost(masked, tuned))
        name = "decoder.layers.1.mlp.linear_fc2.weight"
        assert not torch.equal(tuned.read(name), masked.read(name)), "it has trained"
        assert metrics(run, "pretrain")["sparsity"]["overall"] == pytest.approx(0.5)


@pytest.mark.parametrize("gone", WHERE.values(), ids=WHERE)
def test_zeros_are_held_through_a_rewind(copy: Path, tmp_path: Path, gone: bool, spikes: list[int]) -> None:
    """Of a training that was gone on with, and has dropped the checkpoint that it then began with."""
    settings = {"checkpoint": {"load": str(copy / "prune"), "save_interval": 1, "keep_last": 2}, "train": {"train_iters": 9}}
    recipe = str(write_recipe(tmp_path / "tuned", **settings, guards={"spike_action": "rewind", "rewind_steps": 2}))
    spikes += [7]
    assert cli.main(["pretrain", "-c", recipe, "train.exit_iteration=3"]) == 0
    before = (copy / "prune").rename(copy / "elsewhere") if gone else copy / "prune"
    assert cli.main(["pretrain", "-c", recipe]) == 0
    assert len(read_rewinds(tmp_path / "tuned" / "run" / "pretrain")) == 1
    assert not dict(zeros_lost(stored(copy, before.name), stored(tmp_path / "tuned" / "run", "pretrain")))


def test_a_zero_that_came_by_chance_may_go(copy: Path, tmp_path: Path) -> None:
    """As weights of fp16 too small for it do: what counts are the zeros of the mask, also where only their number is left."""
    folder = tmp_path / "tuned" / "run" / "pretrain"
    recipe = str(write_recipe(tmp_path / "tuned", checkpoint={"load": str(copy / "prune"), "save_interval": 1}))
    assert cli.main(["pretrain", "-c", recipe, "train.exit_iteration=1"]) == 0
    assert json.loads((folder / "source.json").read_text())["zeros"] == metrics(copy, "prune")["sparsity"]["overall"]
    (copy / "prune").rename(copy / "elsewhere")
    noted = json.loads((folder / "source.json").read_text())
    for share, code in ((0.51, 1), (0.49, 0)):
        (folder / "source.json").write_text(json.dumps({**noted, "zeros": share}))
        assert cli.main(["pretrain", "-c", recipe]) == code


LOSING = {
    "in one": (False, False, LOST),
    "gone on with": (True, False, LOST),
    "gone on with alone": (True, True, "has lost zeros of the model that it was made from"),
}


@pytest.mark.parametrize(("stopped", "gone", "told"), LOSING.values(), ids=LOSING)
def test_training_that_has_lost_a_zero_fails(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], stopped: bool, gone: bool, told: str
) -> None:
    settings = {"checkpoint": {"load": str(copy / "prune"), "save_interval": 1}, "optimizer": {"lr_decay_style": "constant"}}
    recipe = str(write_recipe(tmp_path / "tuned", **settings))
    if stopped:
        assert cli.main(["pretrain", "-c", recipe, "train.exit_iteration=1"]) == 0
    if gone:
        (copy / "prune").rename(copy / "elsewhere")
    monkeypatch.setattr("largeformer.training.masks._hold", lambda parameter, parts: None)
    assert cli.main(["pretrain", "-c", recipe]) == 1
    assert told in capfd.readouterr().err
    assert not (tmp_path / "tuned" / "run" / "pretrain" / "manifest.json").exists()


def test_a_smaller_model_says_how_sparse_it_still_is(copy: Path) -> None:
    smaller = ["prune={method: width, ffn_hidden_size: 48, importance: weight}", "run.stages=[prepare, pretrain, {prune: {name: prune-2}}]"]
    assert cli.main(["prune", "-c", str(write_recipe(copy.parent)), "--from", str(copy / "prune"), *smaller]) == 0
    assert metrics(copy, "prune-2")["sparsity"]["zeros"] == sum(count.zeros for count in count_zeros(stored(copy, "prune-2")).values()) > 0
