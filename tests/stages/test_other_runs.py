"""Models that come from elsewhere, in a chain: what they know nothing of, the text above all, is the run's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from largeformer import cli
from largeformer.config.load import load_recipe
from largeformer.stages.common.weights import find_source, shaped_like
from tests.recipes import GPT2, TINY

QUICK = {"train": {**TINY["train"], "train_iters": 1, "eval_iters": 1}, "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False}}
TEXT = {"sources": [{"path": str(Path(json.__file__).parent / "*.py")}], "split": "60,20,20"}


def write_recipe(folder: Path, stages: list[Any], **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**TINY, **QUICK, "run": {"output_dir": str(folder / "run"), "stages": stages}, **sections}))
    return path


def run(recipe: Path, *overrides: str) -> int:
    return cli.main(["run", "-c", str(recipe), *overrides])


def metrics(folder: Path, stage: str) -> dict[str, Any]:
    return json.loads((folder / stage / "manifest.json").read_text())["metrics"]  # type: ignore[no-any-return]


def imported(trained: Path, folder: Path) -> Path:
    """The model of a run, as an import in a run of its own."""
    assert cli.main(["checkpoint", "convert", str(trained), "-o", str(folder / "own")]) == 0
    assert cli.main(["import", "--from", str(folder / "own"), "-o", str(folder / "imported")]) == 0
    return folder / "imported"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained GPT-2, whose positions end with its text."""
    folder = tmp_path_factory.mktemp("elsewhere")
    assert run(write_recipe(folder, ["prepare", "pretrain"], model={**TINY["model"], **GPT2})) == 0
    return folder / "run"


def unfinished(teacher: Path, folder: Path) -> Path:
    shutil.copytree(teacher, folder / "interrupted")
    (folder / "interrupted" / "pretrain" / "manifest.json").unlink()
    return folder / "interrupted"


TEACHERS = {"an import": (imported, "import"), "one that has not finished": (unfinished, "pretrain")}


@pytest.mark.parametrize(("come_by", "name"), TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_from_elsewhere_is_compared_with(teacher: Path, tmp_path: Path, come_by: Any, name: str) -> None:
    """By a student of fewer layers that reads half as far."""
    student = {"init": "scratch", "model": {"num_layers": 2}}
    distill = {"teacher": str(come_by(teacher, tmp_path)), "student": student}
    model = {**TINY["model"], **GPT2, "seq_length": 16}
    recipe = write_recipe(tmp_path / "own", ["prepare", "distill"], model=model, distill=distill)
    assert run(recipe) == 0
    found = metrics(tmp_path / "own" / "run", "distill")["quality"]
    assert found["reference"] == name and found["tokens"] > 0 and found["passed"]
    assert {row["shape"] for row in found["latency"]} == {"1x1 after 8", "1x16", "4x16"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over text, prepared."""
    recipe = write_recipe(tmp_path_factory.mktemp("text"), ["prepare"], tokenizer={"vocab_size": 400}, data=TEXT)
    assert run(recipe) == 0
    return recipe


@pytest.mark.parametrize("whose", ["of the run at hand", "of its own run"])
def test_an_import_reads_the_text_that_was_prepared(prepared: Path, teacher: Path, tmp_path: Path, whose: str) -> None:
    """Its own checkpoint names the built-in corpus, which nobody has prepared."""
    recipe = load_recipe(str(prepared))
    folder = imported(teacher, tmp_path)
    if whose == "of its own run":
        shutil.copytree(Path(recipe.run.output_dir) / "prepare", folder / "prepare")
    found = shaped_like(recipe, find_source(recipe, folder))
    assert found.data.sources == recipe.data.sources and found.data.split == TEXT["split"]
    assert found.model.position_embedding == "learned"


@pytest.mark.parametrize("at", ["prepare", "import"])
def test_an_import_that_reads_by_another_tokenizer_is_refused(
    prepared: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at: str
) -> None:
    """Of a vocabulary of the same size, whose ids mean other text; wherever the text was prepared."""
    folder, own = imported(teacher, tmp_path), tmp_path / "mine"
    shutil.copytree(prepared.parent, own)
    path = folder / "import" / "manifest.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "metrics": {**held["metrics"], "tokenizer_sha256": "2222"}}))
    if at == "import":
        shutil.copytree(own / "run" / "prepare", folder / "prepare")
    assert cli.main(["quantize", "-c", str(own / "recipe.yaml"), f"run.output_dir={own / 'run'}", "--from", str(folder)]) == 2
    assert "reads by another tokenizer (2222) than" in capsys.readouterr().err
    assert not (own / "run" / "quantize").exists()


def test_a_chain_without_a_test_split_is_refused_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**TEXT, "split": "80,20,0"}
    recipe = write_recipe(tmp_path, ["prepare", "pretrain", "prune"], tokenizer={"vocab_size": 400}, data=data)
    assert run(recipe) == 2
    assert "leaves the test split without a document" in capsys.readouterr().err
    assert not (tmp_path / "run" / "pretrain").exists()
