"""Models whose run has got another text since: what was said of the old one, or reads by its tokenizer, is not taken for the new one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from largeformer import cli
from largeformer.artifact import Artifact, read_status
from tests.recipes import python_sources
from tests.stages.test_prune import write_recipe
from tests.tracking.test_jsonl import small_files

HALF = ["distill.student={init: teacher_layers, model: {num_layers: 2}}", "distill.offline={}"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe, its run and its text, none of which names another place."""
    folder = tmp_path_factory.mktemp("changed")
    (folder / "text").mkdir()
    shutil.copyfile(json.decoder.__file__, folder / "text" / "a.py")
    sources = [{"path": "text/*.py", "split": "1,0,0"}, *python_sources()]
    run = {"output_dir": "run"}
    recipe = write_recipe(folder, run=run, data={"sources": sources}, train={"train_iters": 2, "eval_interval": 2})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["run", "-c", str(recipe)]) == 0
    return folder


@pytest.fixture
def recipe(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, elsewhere, which becomes the working directory."""
    shutil.copytree(trained, tmp_path / "copy", ignore=shutil.ignore_patterns("cache"))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "recipe.yaml"


def largeformer(recipe: Path, command: str, *further: str) -> int:
    return cli.main([command, "-c", str(recipe), *further])


def test_answers_are_those_to_one_text(recipe: Path) -> None:
    said = recipe.parent / "run" / "teacher_answers"
    assert largeformer(recipe, "distill", *HALF) == 0
    assert largeformer(recipe, "distill", *HALF, "distill.alpha=0.5", "--fresh") == 0
    assert len(list(said.iterdir())) == 1
    shutil.copyfile(json.encoder.__file__, recipe.parent / "text" / "b.py")
    assert largeformer(recipe, "prepare", "--append") == 0
    assert largeformer(recipe, "distill", *HALF, "distill.alpha=0.4", "--fresh") == 0
    assert len(list(said.iterdir())) == 2


def test_figures_and_what_was_calibrated_are_those_of_the_text(recipe: Path) -> None:
    """A pretraining that has finished stays; what is made of it, and measured, is of the text that is there."""
    shutil.copytree(recipe.parent / "run" / "prepare", recipe.parent / "other")
    chain = [
        "run.stages=[prepare, pretrain, prune, evaluate]",
        "prune={method: wanda, sparsity: 0.5, calibration: {samples: 2, text: other}}",
    ]
    quick = ["quality={tokens: 64, shapes: [[1, 1]], rounds: 1}"]

    def made() -> dict[str, str]:
        assert largeformer(recipe, "run", *chain, *quick) == 0
        there = {name: Artifact.read(recipe.parent / "run" / name) for name in ("pretrain", "prune", "evaluate")}
        keys = {f"{name}'s quality": there[name].metrics["quality"]["key"] for name in ("pretrain", "prune")}  # type: ignore[union-attr]
        return {**{name: artifact.identity for name, artifact in there.items() if artifact is not None}, **keys}

    first = made()
    assert made() == first
    shutil.copyfile(json.encoder.__file__, recipe.parent / "text" / "b.py")
    assert largeformer(recipe, "prepare", "--append") == 0
    second = made()
    assert {name for name in first if second[name] == first[name]} == {"pretrain"}
    shutil.copytree(recipe.parent / "run" / "prepare", recipe.parent / "other", dirs_exist_ok=True)
    assert {name for name, named in made().items() if named != second[name]} == {"prune", "evaluate"}


def test_a_model_is_not_read_by_another_tokenizer(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    pruned = ["prune.method=magnitude"]
    assert largeformer(recipe, "prune", *pruned) == 0
    assert largeformer(recipe, "evaluate", "--from", str(run / "prune")) == 0
    shutil.copyfile(shutil.__file__, recipe.parent / "text" / "a.py")
    shutil.rmtree(run / "prepare")
    assert largeformer(recipe, "prepare") == 0
    for stage in ("pretrain", "prune"):
        assert largeformer(recipe, "evaluate", "--from", str(run / stage)) == 2
        assert "reads by another tokenizer" in capfd.readouterr().err


@pytest.mark.parametrize("anew", [True, False])
def test_training_does_not_go_on_by_another_tokenizer(recipe: Path, capfd: pytest.CaptureFixture[str], anew: bool) -> None:
    """Beside `anew`: a prepare folder that was lost, and made again of the same text."""
    run = recipe.parent / "run"
    shutil.rmtree(run / "pretrain")
    assert largeformer(recipe, "pretrain", "train.exit_iteration=1") == 0
    if anew:
        shutil.copyfile(shutil.__file__, recipe.parent / "text" / "a.py")
    shutil.rmtree(run / "prepare")
    rows = (run / "pretrain" / "metrics.jsonl").read_bytes()
    capfd.readouterr()
    assert largeformer(recipe, "pretrain") == (2 if anew else 0)
    assert ("read by another tokenizer" in capfd.readouterr().err) is anew
    assert (rows == (run / "pretrain" / "metrics.jsonl").read_bytes()) is anew


def test_training_does_not_go_on_from_a_run_of_another_tokenizer(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A finished training of the same folder stays where it is, also with --fresh; an unfinished one of the other run says it too."""
    run, other = recipe.parent / "run", recipe.parent / "other"
    shutil.copytree(run, other)
    shutil.copyfile(shutil.__file__, recipe.parent / "text" / "a.py")
    shutil.rmtree(run / "prepare")
    for unfinished in (False, True):
        if unfinished:
            (other / "pretrain" / "manifest.json").unlink()
        assert largeformer(recipe, "pretrain", f"checkpoint.load={other}", "train.train_iters=4", "--fresh") == 2
        assert f"checkpoint.load {other}" in (told := capfd.readouterr().err) and "reads by another tokenizer" in told
        assert (run / "pretrain" / "manifest.json").exists() and not (run / "pretrain.old-1").exists()


@pytest.mark.parametrize(
    ("settings", "same"), [(["distill.teacher=pretrain"], True), (["distill.seed=1234"], True), (["distill.seed=5"], False)]
)
def test_the_same_teacher_by_another_name_teaches_the_same(recipe: Path, settings: list[str], same: bool) -> None:
    assert largeformer(recipe, "distill", HALF[0]) == 0
    assert (largeformer(recipe, "distill", HALF[0], *settings) == 0) is same


def test_answers_that_cannot_be_written(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert largeformer(recipe, "distill", HALF[0], f"distill.offline={{folder: {tmp_path / 'file' / 'answers'}}}") == 2
    error = capfd.readouterr().err
    assert "name another as distill.offline.folder" in error and "Traceback" not in error


def test_answers_that_no_disk_holds_are_told_in_a_sentence(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with small_files(20_000):
        assert largeformer(recipe, "distill", *HALF) == 1
    error = capfd.readouterr().err
    assert "the teacher's answers cannot be written" in error and "Traceback" not in error
    assert largeformer(recipe, "distill", *HALF) == 0


def test_a_training_that_diverges_is_told_in_a_sentence(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    diverging = "distill.optimizer={lr: 1.0e+19, min_lr: 0.0, clip_grad: 0.0}"
    assert largeformer(recipe, "distill", HALF[0], diverging) == 1
    error = capfd.readouterr().err
    assert "the validation loss after the last step is" in error and "Traceback" not in error


def test_an_import_that_reads_otherwise_is_another_one(recipe: Path) -> None:
    run, imported = recipe.parent / "run", recipe.parent / "imported"
    assert largeformer(recipe, "export", "export.formats=[largeformer]", "export.gate_tokens=64") == 0
    found = []
    for changes in ([], [], ["model.seq_length=16"]):
        assert cli.main(["import", "--from", str(run / "export" / "largeformer"), "-o", str(imported), "--fresh", *changes]) == 0
        made = Artifact.read(imported / "import")
        assert made is not None
        found.append(made.identity)
    assert found[0] == found[1] != found[2]


def test_an_evaluation_has_its_own_name_in_the_status(recipe: Path) -> None:
    assert largeformer(recipe, "run", "run.stages=[pretrain, {evaluate: {name: at-the-end}}]") == 0
    assert (read_status(recipe.parent / "run") or {})["stage"] == "at-the-end"
