"""`prune` as a user runs it: a trained run, what comes out and what the manifest says of it, later stages, and everything refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from largeformer import cli
from largeformer.artifact import read_status, write_status
from largeformer.export.streaming import StoredTensors
from largeformer.training import gradual
from tests.recipes import TINY, python_sources
from tests.stages.test_end_to_end import start

STEPS = 4


def write_recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    """A recipe over the sources of Python's `email` package, of which a few steps are trained."""
    tree: dict[str, Any] = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run"), "stages": ["prepare", "pretrain"]},
        "tokenizer": {"vocab_size": 500},
        "data": {"sources": python_sources("email")},
        "train": {**TINY["train"], "train_iters": STEPS, "eval_interval": STEPS, "eval_iters": 1},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
        "prune": {"calibration": {"samples": 8}},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("prune"))


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    done = start("run", "-c", str(recipe))
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe.parent / "run"


@pytest.fixture
def prune(trained: Path, recipe: Path, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """`prune(*overrides)` on a copy of the run, which is `prune.run`."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("cache"))

    def run(*overrides: str) -> int:
        return cli.main(["prune", "-c", str(recipe), f"run.output_dir={copy}", *overrides])

    run.run = copy  # type: ignore[attr-defined]
    yield run


def written_at(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def metrics(run: Path, stage: str = "prune") -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())["metrics"]  # type: ignore[no-any-return]


SMALLER = {
    "width": (["prune.target_parameters=0.8"], {"hidden_size", "ffn_hidden_size"}),
    "width by weights": (["prune.ffn_hidden_size=64", "prune.importance=weight"], {"ffn_hidden_size"}),
    "heads": (["prune.num_attention_heads=2"], {"num_attention_heads"}),
    "depth": (["prune.method=depth", "prune.num_layers=3"], {"num_layers"}),
    "depth by ablation": (["prune.method=depth", "prune.num_layers=2", "prune.importance=ablation"], {"num_layers"}),
}

IN_THE_DEFAULT_TIER = ("width", "depth")


@pytest.mark.parametrize(
    ("overrides", "axes"),
    [pytest.param(*case, id=name, marks=() if name in IN_THE_DEFAULT_TIER else pytest.mark.slow) for name, case in SMALLER.items()],
)
def test_a_smaller_model_that_later_stages_read(prune: Any, recipe: Path, overrides: list[str], axes: set[str]) -> None:
    assert prune(*overrides) == 0
    found = metrics(prune.run)
    assert set(found["axes"]) == axes
    assert found["parameters"] < found["parameters_before"] and found["perplexity"] != found["perplexity_before"]
    table = json.loads((prune.run / "prune" / "importance.json").read_text())
    assert len(table["kept"]["layers"]) == found["axes"].get("num_layers", {"after": TINY["model"]["num_layers"]})["after"]
    removed = set(range(TINY["model"]["num_layers"])) - set(table["kept"]["layers"])
    assert not table["removed_in_order"] or removed == set(table["removed_in_order"])
    (checkpoint,) = (prune.run / "prune" / "checkpoints").glob("step_*")
    model = yaml.safe_load((checkpoint / "config.yaml").read_text())["model"]
    assert all(model[axis] == size["after"] for axis, size in found["axes"].items())
    assert model["kv_channels"] == 16
    write_status(prune.run, "requeue", stage="pretrain")
    assert cli.main(["evaluate", "--from", str(prune.run / "prune")]) == 0
    assert (read_status(prune.run) or {})["stage"] == "pretrain", "a run may be training while another process evaluates it"
    assert metrics(prune.run, "evaluate")["checkpoint"] == "step_00000000"


FITTED = ("mlp.linear_fc2.weight", "self_attention.linear_proj.weight")


@pytest.mark.parametrize("fitted", [True, False])
def test_weights_behind_channels_and_heads_that_go_are_fitted_unless_told_not_to(prune: Any, fitted: bool) -> None:
    """Unfitted, they are the teacher's columns; all other weights are the teacher's in either case."""
    sizes = ("prune.ffn_hidden_size=64", "prune.num_attention_heads=2")
    assert prune(*sizes, f"prune.reconstruct={str(fitted).lower()}") == 0
    kept = json.loads((prune.run / "prune" / "importance.json").read_text())["kept"]
    (made,), (given,) = ((prune.run / stage / "checkpoints").glob("step_*") for stage in ("prune", "pretrain"))
    smaller, teacher = StoredTensors.of_checkpoint(made), StoredTensors.of_checkpoint(given)
    for name in smaller.names:
        whole, cut = teacher.read(name), smaller.read(name)
        if name.endswith(FITTED):
            layer = int(name.split(".")[2])
            channels = kept["ffn"][layer] if "fc2" in name else [16 * head + at for head in kept["heads"][layer] for at in range(16)]
            assert torch.equal(cut, whole[:, channels]) is not fitted, name
        elif whole.shape == cut.shape:
            assert torch.equal(cut, whole), name


SPARSE = {
    "magnitude": (["prune.method=magnitude", "prune.sparsity=0.4"], 0.4),
    "global": (["prune.method=magnitude", "prune.scope=global"], 0.5),
    "wanda 2:4": (["prune.method=wanda", "prune.pattern=2:4"], 0.5),
    "sparsegpt": (["prune.method=sparsegpt", "prune.sparsity=0.6", "prune.block_size=32"], 0.6),
}


@pytest.mark.parametrize(("overrides", "share"), SPARSE.values(), ids=SPARSE)
def test_a_sparse_model_of_the_same_shape(prune: Any, overrides: list[str], share: float) -> None:
    assert prune(*overrides) == 0
    found = metrics(prune.run)
    assert found["sparsity"]["overall"] == pytest.approx(share, abs=0.01) and found["parameters_kept"] == 1.0
    assert found["sparsity"].get("pattern_holds") is (True if "prune.pattern=2:4" in overrides else None)
    table = json.loads((prune.run / "prune" / "zeros.json").read_text())
    assert len(table) == 5 * TINY["model"]["num_layers"]
    assert sum(row["zeros"] for row in table.values()) == found["sparsity"]["zeros"]
    assert found["perplexity"] != found["perplexity_before"]


GRADUAL = (
    "prune.method=magnitude",
    "prune.sparsity=0.6",
    "prune.schedule={start: 1, end: 4, interval: 1}",
    "prune.train={train_iters: 6, eval_interval: 6}",
    "checkpoint.save_interval=2",
)


@pytest.mark.slow
def test_a_gradual_schedule_interrupted_is_the_same(prune: Any, trained: Path, recipe: Path, tmp_path: Path) -> None:
    """Stopped in the middle of the schedule and gone on with, and never stopped: the same weights, bit for bit."""
    assert prune(*GRADUAL, "prune.train={train_iters: 6, eval_interval: 6, exit_iteration: 3}") == 0
    assert not (prune.run / "prune" / "manifest.json").exists()
    assert prune(*GRADUAL) == 0
    found = metrics(prune.run)
    assert found["sparsity"]["overall"] == pytest.approx(0.6, abs=2e-3) and found["steps"] == 6
    shutil.copytree(trained, tmp_path / "other", ignore=shutil.ignore_patterns("cache"))
    assert cli.main(["prune", "-c", str(recipe), f"run.output_dir={tmp_path / 'other'}", *GRADUAL]) == 0
    one, other = (StoredTensors.of_checkpoint(run / "prune" / "checkpoints" / "step_00000006") for run in (prune.run, tmp_path / "other"))
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.names)


def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are masked by the zeros of the start alone."""
    held = gradual._held
    monkeypatch.setattr(gradual, "_held", lambda *own: replace(one := held(*own), zeros=one.zeros.clone()))


def half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradual, "share_at", lambda step, prune: prune.share / 2)


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...], str]] = {
    "a zero that grew comes back": (forgotten, (), "pruned weights are not 0 any more"),
    "the share is not reached": (half_way, (), "weights are 0, fewer than the 0.6 that were asked for"),
    "the share of all is not reached": (half_way, ("prune.scope=global",), "all linear layers"),
}


@pytest.mark.parametrize(("harm", "settings", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_gradual_schedule_without_its_zeros_has_not_finished(
    harm: Callable[[pytest.MonkeyPatch], None],
    settings: tuple[str, ...],
    sentence: str,
    prune: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as broken:
        harm(broken)
        assert prune(*GRADUAL, *settings) == 1
    assert sentence in capfd.readouterr().err
    assert not (prune.run / "prune" / "manifest.json").exists()


def test_a_gradual_schedule_says_what_it_came_to(prune: Any) -> None:
    assert prune(*GRADUAL) == 0
    assert metrics(prune.run)["sparsity"]["overall"] == pytest.approx(0.6, abs=2e-3) and metrics(prune.run)["perplexity"] > 1


def test_a_gradual_schedule_reads_text_as_its_own_recipe_says(prune: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """The model was trained, and its text prepared, by a recipe that says otherwise."""
    otherwise = ("data.eod_mask_loss=true", "data.sampling={type: temperature, temperature: 2.0}")
    assert prune(*GRADUAL, *otherwise) == 0
    read = yaml.safe_load((prune.run / "prune" / "config.yaml").read_text())["data"]
    assert read["eod_mask_loss"] is True and read["sampling"]["type"] == "temperature"
    assert prune(*GRADUAL) == 2
    assert "data.eod_mask_loss was True, is False" in capfd.readouterr().err


def test_what_is_done_is_not_done_again_and_another_is_refused(prune: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert prune("prune.ffn_hidden_size=64") == 0
    before = (prune.run / "prune" / "manifest.json").stat().st_mtime_ns
    assert prune("prune.ffn_hidden_size=64") == 0
    assert (prune.run / "prune" / "manifest.json").stat().st_mtime_ns == before
    assert prune("prune.ffn_hidden_size=48") == 2
    assert "prune.ffn_hidden_size was 64, is 48" in capfd.readouterr().err
    assert prune("prune.ffn_hidden_size=48", "--fresh") == 0
    assert (prune.run / "prune.old-1" / "manifest.json").exists()


def text_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert cli.main(["generate", *arguments, "--prompt", "def load(", "--max-new-tokens", "12", "--seed", "1"]) == 0
    return capfd.readouterr().out


def test_text_is_that_of_the_runs_last_model_unless_another_is_named(prune: Any, recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the recipe that the chain began with, whose `model` is not the pruned one's."""
    assert prune("prune.method=depth", "prune.num_layers=2") == 0
    began = ["-c", str(recipe), f"run.output_dir={prune.run}"]
    last = text_of(capfd, *began, "run.stages=[prepare, pretrain, prune]")
    assert last == text_of(capfd, *began, "--from", str(prune.run / "prune")) == text_of(capfd, "--from", str(prune.run / "prune"))
    assert text_of(capfd, *began) == text_of(capfd, "--from", str(prune.run)) != last


@pytest.mark.slow
def test_a_chain_with_two_prunings(prune: Any, recipe: Path) -> None:
    stages = "[prepare, pretrain, {prune: {ffn_hidden_size: 64}}, {prune: {name: prune-2, method: depth, num_layers: 3}}]"
    assert cli.main(["run", "-c", str(recipe), f"run.output_dir={prune.run}", f"run.stages={stages}"]) == 0
    second = metrics(prune.run, "prune-2")
    assert second["axes"] == {"num_layers": {"before": 4, "after": 3}}
    assert second["parameters_before"] == metrics(prune.run)["parameters"]
    assert second["perplexity_before"] == pytest.approx(metrics(prune.run)["perplexity"], rel=1e-6)


def cut_by_another_tokenizer(prepared: Path, folder: Path) -> None:
    """The text of a `prepare` folder, as if another tokenizer had cut it."""
    shutil.copytree(prepared, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["metrics"]["tokenizer_sha256"] = "2222"
    (folder / "manifest.json").write_text(json.dumps(manifest))


BAD = {
    "no head": (["prune.num_attention_heads=1"], "prune.num_attention_heads 1 leaves no equal number of heads"),
    "no layer": (["prune.method=depth", "prune.num_layers=0"], "prune.num_layers is 0, which should be above 0"),
    "too small": (["prune.target_parameters=0.001"], "can be had: change it, or prune.axes"),
    "unknown axis": (["prune.axes=[depth]"], "prune.axes[0] is 'depth', which is none of hidden_size"),
    "ratio": (["prune.method=magnitude", "prune.sparsity=1.5"], "prune.sparsity is 1.5, which should be below 1"),
    "other method's": (["prune.sparsity=0.5"], "prune.sparsity is 0.5, which prune.method width does not read"),
    "pattern": (["prune.method=wanda", "prune.pattern=2:7"], "prune.pattern 2:7 does not divide model.hidden_size 64"),
    "no text": (["prune.calibration.text=/nowhere"], "calibration.text /nowhere cannot be read"),
    "another tokenizer's text": (["prune.calibration.text=others"], "calibration.text others was cut by another tokenizer (2222)"),
    "another tokenizer's text, for zeros": (
        ["prune.method=wanda", "prune.calibration.text=others"],
        "calibration.text others was cut by another tokenizer (2222)",
    ),
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.values(), ids=BAD)
def test_bad_input_exits_with_2_and_leaves_all_as_it_was(
    prune: Any,
    overrides: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    cut_by_another_tokenizer(prune.run / "prepare", tmp_path / "others")
    assert prune(*overrides) == 2
    error = capfd.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not list(prune.run.glob("prune/checkpoints/*")) and (prune.run / "pretrain" / "manifest.json").exists()


REFUSED = {
    "no text": (["prune.calibration.text=/nowhere"], "calibration.text /nowhere cannot be read"),
    "zeros, no text": (["prune.method=wanda", "prune.calibration.text=/nowhere"], "calibration.text /nowhere cannot be read"),
    "pattern": (["prune.method=wanda", "prune.pattern=2:7"], "prune.pattern 2:7 does not divide model.hidden_size 64"),
}


def test_what_is_refused_leaves_the_finished_stage_where_it_is(prune: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert prune("prune.ffn_hidden_size=64", "prune.importance=weight") == 0
    before = written_at(prune.run / "prune")
    for name, (overrides, sentence) in REFUSED.items():
        assert prune(*overrides, "--fresh") == 2, name
        assert sentence in capfd.readouterr().err
        assert written_at(prune.run / "prune") == before and not (prune.run / "prune.old-1").exists(), name


def test_a_bad_entry_of_a_chain_is_told_before_anything_runs(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stages = "[prepare, pretrain, {prune: {method: depth, ffn_hidden_size: 64}}]"
    assert cli.main(["run", "-c", str(recipe), f"run.output_dir={tmp_path / 'run'}", f"run.stages={stages}"]) == 2
    assert "which prune.method depth does not read" in capfd.readouterr().err
    assert not (tmp_path / "run" / "prepare").exists()
