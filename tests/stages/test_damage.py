"""A finished stage whose files are gone, or not what was written, is not taken for finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from largeformer import cli
from tests.stages.test_export import write_recipe

pytest.importorskip("transformers")
FORMAT = Path("export", "hf", "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe's file; the run lies beside it."""
    recipe = write_recipe(tmp_path_factory.mktemp("damage"), export={"formats": ["hf"]}, checkpoint={"save_interval": 1})
    assert cli.main(["run", "-c", str(recipe)]) == 0
    return recipe


@pytest.fixture
def recipe(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The same elsewhere."""
    shutil.copytree(whole.parent / "run", tmp_path / "run")
    path = tmp_path / "recipe.yaml"
    path.write_text(whole.read_text().replace(str(whole.parent), str(tmp_path)))
    yield path


def again(recipe: Path, *arguments: str) -> int:
    return cli.main(["run", "-c", str(recipe), *arguments])


def written(run: Path) -> dict[str, tuple[int, bytes]]:
    """The manifests: when, and what."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.glob("*/manifest.json")}


@pytest.mark.slow
@pytest.mark.parametrize("gone", [True, False])
def test_an_export_is_made_anew(recipe: Path, gone: bool, capfd: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    before, content = written(run), (run / FORMAT).read_bytes()
    (run / FORMAT).unlink() if gone else (run / FORMAT).write_bytes(content[:-1])
    assert again(recipe) == 0
    told = capfd.readouterr().out
    assert "the export is damaged (" in told and ("is missing" if gone else f"{len(content) - 1:,} bytes") in told
    assert (run / FORMAT).read_bytes() == content and (run / "export.old-1").is_dir()
    after = written(run)
    assert {name for name, one in before.items() if after[name] != one} == {"export"}
    assert again(recipe) == 0 and written(run) == after, "it is whole again"


def test_prepared_data_is_missed_before_anything_is_done(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    before = written(run)
    pair, *_ = sorted((run / "prepare").glob("*.bin"))
    content = pair.read_bytes()
    pair.write_bytes(content[:-2])
    assert again(recipe) == 2
    error = capfd.readouterr().err
    assert f"{pair} has {len(content) - 2:,} bytes" in error and "--fresh" in error
    assert written(run) == before
    assert again(recipe, "--fresh") == 0
    assert pair.read_bytes() == content and (run / "prepare.old-1").is_dir()
    assert written(run)["pretrain"] == before["pretrain"]


def test_training_goes_on_from_the_checkpoint_before(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    (file,) = (run / "pretrain" / "checkpoints" / "step_00000002" / "weights").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    assert again(recipe) == 0
    assert "step_00000002 is damaged" in capfd.readouterr().out
    assert file.read_bytes() == content, "the last step was taken again"
    assert json.loads((run / "pretrain" / "manifest.json").read_text())["metrics"]["steps"] == 2


def test_training_without_a_whole_checkpoint(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = recipe.parent / "run"
    before = written(run)
    for checkpoint in (run / "pretrain" / "checkpoints").glob("step_*"):
        (checkpoint / "state.json").unlink()
    assert again(recipe) == 2
    error = capfd.readouterr().err
    assert "its checkpoints are damaged" in error and "state.json is missing" in error and "--fresh" in error
    assert written(run) == before
    assert again(recipe, "--fresh") == 0
    assert (run / "pretrain.old-1").is_dir() and (run / "pretrain" / "checkpoints" / "step_00000002" / "state.json").exists()
