"""`distill` as a user runs it: a chain, a stop in the middle, a sparse student, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.config.chain import entry_named
from largeformer.config.load import load_recipe, recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.export.streaming import StoredTensors
from largeformer.parallel.groups import destroy_groups
from largeformer.stages.distill_pupils import chosen_layers, lesson_of, pairs_of
from largeformer.training.checkpointing import load_weights
from largeformer.training.saving import save_weights
from tests.one_process import Built
from tests.recipes import TINY, tiny_recipe

STEPS = 4
HALF = {"student": {"init": "teacher_layers", "model": {"num_layers": 2}}}
NARROW = {"student": {"init": "scratch", "model": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64}}, "hidden": {"loss": "mse"}}


def write_recipe(folder: Path, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        **TINY,
        "run": {"name": "tiny", "output_dir": str(folder / "run"), "stages": ["prepare", "pretrain", "distill"]},
        "train": {**TINY["train"], "train_iters": STEPS, "eval_interval": 2, "eval_iters": 1},
        "checkpoint": {"save_interval": 1},
        "tracking": {"wandb": {"mode": "disabled"}, "tensorboard": False},
        "distill": HALF,
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def largeformer(*arguments: str) -> int:
    return cli.main(list(arguments))


def manifest(run: Path, stage: str = "distill") -> dict[str, Any]:
    return json.loads((run / stage / "manifest.json").read_text())  # type: ignore[no-any-return]


def rows(run: Path, stage: str = "distill") -> list[dict[str, Any]]:
    """Training rows, without what depends on the clock."""
    kept = ("step", "loss", "grad_norm", "kd_loss", "ce_loss", "hidden_loss", "lr", "tokens")
    found = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in kept if key in row} for row in found if "loss" in row]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after the chain."""
    folder = tmp_path_factory.mktemp("distill")
    assert largeformer("run", "-c", str(write_recipe(folder))) == 0
    return folder / "run"


@pytest.fixture
def trained(finished: Path, tmp_path: Path) -> Path:
    """The run with its teacher alone, elsewhere."""
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("distill"))
    return tmp_path / "run"


def weights(stage: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint, saved by one rank."""
    checkpoint = stage / "checkpoints" / (stage / "checkpoints" / "latest").read_text().strip()
    with safe_open(checkpoint / "weights" / "rank_00000.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_the_manifest_says_who_learnt_from_whom(finished: Path) -> None:
    teacher, student = manifest(finished, "pretrain"), manifest(finished)
    assert student["parents"]["teacher"] == teacher["identity"] and student["parents"]["prepare"]
    assert student["metrics"]["parameters"] < student["metrics"]["teacher_parameters"]
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row in found:
        assert row["loss"] == pytest.approx(0.7 * row["kd_loss"] + 0.3 * row["ce_loss"], rel=1e-6)
    assert student["metrics"]["kd_loss"] == found[-1]["kd_loss"]


def test_later_stages_read_the_students_shape_by_themselves(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert yaml.safe_load((finished / "distill" / "checkpoints" / "step_00000004" / "config.yaml").read_text())["model"]["num_layers"] == 2
    assert {name.split(".")[2] for name in weights(finished / "distill") if ".layers." in name} == {"0", "1"}
    assert largeformer("generate", "--from", str(finished / "distill"), "--prompt", "1 2 3", "--max-new-tokens", "2") == 0


@pytest.mark.slow
def test_a_finished_stage_is_skipped_and_a_changed_one_runs_again(trained: Path) -> None:
    recipe = str(write_recipe(trained.parent))
    assert largeformer("run", "-c", recipe) == 0
    written = (trained / "distill" / "checkpoints" / "latest").stat().st_mtime_ns
    assert largeformer("run", "-c", recipe) == 0
    assert (trained / "distill" / "checkpoints" / "latest").stat().st_mtime_ns == written
    taught = (trained / "pretrain" / "checkpoints" / "latest").stat().st_mtime_ns
    assert largeformer("run", "-c", recipe, "distill.temperature=2.0") == 0
    assert manifest(trained)["metrics"]["temperature"] == 2.0
    assert (trained / "pretrain" / "checkpoints" / "latest").stat().st_mtime_ns == taught


@pytest.mark.parametrize("settings", [pytest.param(HALF, id="half the layers"), pytest.param(NARROW, id="with projections")])
def test_a_run_that_stops_in_the_middle_ends_the_same(settings: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "other" / "run")
    at_once, in_two = write_recipe(trained.parent, distill=settings), write_recipe(tmp_path / "other", distill=settings)
    assert largeformer("distill", "-c", str(at_once)) == 0
    assert largeformer("distill", "-c", str(in_two), "train.exit_iteration=2") == 0
    assert not (tmp_path / "other" / "run" / "distill" / "manifest.json").exists()
    assert largeformer("distill", "-c", str(in_two)) == 0
    assert rows(trained) == rows(tmp_path / "other" / "run")
    one, two = weights(trained / "distill"), weights(tmp_path / "other" / "run" / "distill")
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    assert any(name.startswith("distillation.") for name in one) is ("hidden" in settings)
    read = StoredTensors.of_checkpoint(trained / "distill" / "checkpoints" / "step_00000004").names
    assert sorted(read) == sorted(name for name in one if not name.startswith("distillation."))


def test_what_has_not_finished_is_built_on_only_where_it_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a stage is left that is beyond its `quality.limits`: checkpoints, and no manifest."""
    run, recipe = tmp_path / "run", str(write_recipe(tmp_path))
    shutil.copytree(finished, run)
    (run / "distill" / "manifest.json").unlink()
    prune = ["prune", "-c", recipe, "prune.method=magnitude"]
    assert largeformer(*prune) == 2
    assert f"{run / 'distill'} has left checkpoints but has not finished" in capsys.readouterr().err
    assert not (run / "prune").exists()
    assert largeformer(*prune, "--from", str(run / "distill")) == 0


LATER = {
    "width": (["prune", "prune.ffn_hidden_size=32"], "prune"),
    "depth": (["prune", "prune.method=depth", "prune.num_layers=1"], "prune"),
    "zeros": (["prune", "prune.method=magnitude"], "prune"),
    "integers": (["quantize", "quantize.calibration.samples=2", "quantize.evaluation_tokens=64"], "quantize"),
    "export": (["export", "export.formats=[hf]", "export.gate_tokens=64"], "export"),
}


@pytest.mark.slow
def test_later_stages_do_not_read_projections(trained: Path) -> None:
    pytest.importorskip("compressed_tensors")
    recipe = str(write_recipe(trained.parent, distill=NARROW))
    assert largeformer("distill", "-c", recipe) == 0
    assert any(name.startswith("distillation.") for name in weights(trained / "distill"))
    for name, (arguments, stage) in LATER.items():
        run = trained.parent / name / "run"
        shutil.copytree(trained, run)
        assert largeformer(*arguments, "-c", recipe, f"run.output_dir={run}", "--from", str(trained / "distill")) == 0, name
        if stage != "export":
            assert not any("projections" in name for name in weights(run / stage))


def test_only_pretraining_goes_on_from_the_checkpoint_that_the_recipe_names(finished: Path, trained: Path) -> None:
    recipe = write_recipe(trained.parent, checkpoint={"load": str(finished / "distill")})
    assert largeformer("distill", "-c", str(recipe)) == 0
    assert [row["step"] for row in rows(trained)] == list(range(1, STEPS + 1))


def test_the_teachers_layers_are_copied(trained: Path, one_process: Callable[[Recipe], Built]) -> None:
    """A student that has taken no step to speak of is made of the teacher's first and last layer."""
    recipe = write_recipe(trained.parent, optimizer={"lr": 1.0e-12, "weight_decay": 0.0})
    assert largeformer("distill", "-c", str(recipe)) == 0
    teacher, student = weights(trained / "pretrain"), weights(trained / "distill")
    for name, value in student.items():
        torch.testing.assert_close(value, teacher[name.replace("layers.1.", "layers.3.")], atol=1e-7, rtol=1e-5)


@pytest.fixture
def sparse(trained: Path, one_process: Callable[[Recipe], Built]) -> Path:
    """A checkpoint of the teacher's shape with half of its linear weights 0."""
    made = load_recipe(str(trained / "pretrain" / "config.yaml"), [])
    built = one_process(made)
    load_weights(trained / "pretrain" / "checkpoints" / "step_00000004", built.shards)
    with torch.no_grad():
        for shard in built.shards:
            if ".linear_" in shard.key:
                values = shard.of(shard.parameter.data)
                values[values.abs() < values.abs().median()] = 0.0
    path = save_weights(trained.parent / "sparse" / "prune" / "checkpoints", built.shards, recipe_yaml(made))
    destroy_groups()
    return path


def test_a_sparse_student_stays_sparse(sparse: Path, trained: Path) -> None:
    recipe = write_recipe(trained.parent, distill={"student": {}})
    assert largeformer("distill", "-c", str(recipe), "--from", str(sparse)) == 0
    metrics = manifest(trained)["metrics"]
    assert metrics["sparsity"]["overall"] == pytest.approx(0.5, abs=0.01)
    zeros = {name: int((value == 0).sum()) for name, value in weights(trained / "distill").items() if ".linear_" in name}
    assert sum(zeros.values()) == metrics["sparsity"]["zeros"]


def test_a_weight_that_comes_back_fails_the_stage(
    sparse: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("largeformer.training.masks._hold", lambda parameter, parts: None)
    recipe = write_recipe(trained.parent, distill={"student": {}})
    assert largeformer("distill", "-c", str(recipe), "--from", str(sparse)) == 1
    assert "pruned weights are not 0 any more" in capsys.readouterr().err
    assert not (trained / "distill" / "manifest.json").exists()


def test_offline_with_the_whole_vocabulary_is_online(trained: Path, tmp_path: Path) -> None:
    assert largeformer("distill", "-c", str(write_recipe(trained.parent))) == 0
    online = rows(trained)
    offline = {**HALF, "offline": {"top_k": None, "precision": "fp32"}}
    recipe = write_recipe(trained.parent, distill=offline)
    assert largeformer("distill", "-c", str(recipe), "--fresh") == 0
    for one, other in zip(online, rows(trained), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    (answers,) = (trained / "teacher_answers").iterdir()
    written = {path.name: path.stat().st_mtime_ns for path in answers.glob("*.safetensors")}
    # Another student, with other micro batches, and nothing is asked again.
    changed = ["distill.student.model={num_layers: 1}", "train.micro_batch_size=1", "--fresh"]
    assert largeformer("distill", "-c", str(recipe), *changed) == 0
    assert {path.name: path.stat().st_mtime_ns for path in answers.glob("*.safetensors")} == written
    assert len(rows(trained)) == STEPS


def test_answers_of_another_teacher_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(trained.parent, distill={**HALF, "offline": {"folder": str(tmp_path / "answers")}})
    assert largeformer("distill", "-c", str(recipe)) == 0
    before = {path: path.stat().st_mtime_ns for path in (trained / "distill").rglob("*") if path.is_file()}
    assert largeformer("run", "-c", str(recipe), "distill.temperature=2.0") == 2
    assert "temperature was 3.0, is 2.0" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (trained / "distill").rglob("*") if path.is_file()} == before
    assert not (trained / "distill.old-1").exists()


@pytest.fixture(scope="module")
def retrained(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of the teacher's name, and other weights."""
    folder = tmp_path_factory.mktemp("retrained")
    recipe = write_recipe(folder, run={"output_dir": str(folder / "run"), "stages": ["prepare", "pretrain"], "seed": 7})
    assert largeformer("run", "-c", str(recipe)) == 0
    return folder / "run"


PUPILS = {"previous": {"student": {}}, "of the teacher's layers": HALF, "new": NARROW}


@pytest.mark.parametrize("settings", PUPILS.values(), ids=PUPILS)
def test_a_teacher_that_has_not_finished_is_known_by_its_weights(
    settings: dict[str, Any], trained: Path, retrained: Path, tmp_path: Path
) -> None:
    """Its checkpoint's name says nothing of them. Of one that has, its manifest says it, and the name is enough."""
    teacher = tmp_path / "teacher"

    def origin(weights: Path, *, finished: bool) -> dict[str, Any]:
        shutil.rmtree(teacher, ignore_errors=True)
        shutil.copytree(weights, teacher)
        if not finished:
            (teacher / "pretrain" / "manifest.json").unlink()
        recipe = load_recipe(str(write_recipe(trained.parent, distill={**settings, "teacher": str(teacher)})), [])
        prepared = Artifact.read(trained / "prepare")
        assert prepared is not None
        return lesson_of(recipe, entry_named(recipe, "distill"), trained / "pretrain", prepared).origin()

    one, same, other = (origin(run, finished=False) for run in (trained, trained, retrained))
    assert one == same != other
    assert origin(trained, finished=True)["teacher_checkpoint"] == "step_00000004"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"alpha": 1.5}, "distill.alpha is 1.5"),
    "the teacher is not there": ({"teacher": "runs/nobody"}, "distill.teacher runs/nobody is neither a stage of"),
    "student and teacher are one": ({"student": {}}, "the student would be the teacher itself"),
    "deeper than the teacher": (
        {"student": {"init": "teacher_layers", "model": {"num_layers": 6}}},
        "the student has 6 layers (num_layers) and the teacher 4",
    ),
    "a layer too many": (
        {"student": {"init": "teacher_layers", "layers": [0, 4]}},
        "[0, 4] must be 2 different ones of the teacher's layers 0 to 3",
    ),
    "layers without a teacher's": ({"student": {"init": "scratch", "layers": [0, 1]}}, "distill.student.init is scratch"),
    "another width": (
        {"student": {"init": "teacher_layers", "model": {"hidden_size": 32}}},
        "distill.student.model.hidden_size cannot differ",
    ),
    "an unknown key": ({"student": {"init": "scratch", "model": {"num_layer": 2}}}, "num_layer"),
    "map out of range": (
        {**HALF, "hidden": {"layers": [[0, 1], [1, 4]]}},
        "distill.hidden.layers [1, 4]: the teacher has the layers 0 to 3",
    ),
    "hidden states offline": ({**HALF, "hidden": {}, "offline": {}}, "distill.hidden needs the teacher's hidden states"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_work(name: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings, sentence = REFUSED[name]
    path = write_recipe(trained.parent)
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "distill": settings}))
    assert largeformer("distill", "-c", str(path)) == 2
    assert sentence in capsys.readouterr().err
    assert not (trained / "distill").exists()


@pytest.mark.parametrize("settings", [HALF, {"student": {"init": "scratch", "model": {"num_layers": 2}}}], ids=["its layers", "scratch"])
def test_from_names_the_teacher_of_a_student_that_no_stage_made(
    settings: dict[str, Any], trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where `distill.teacher` names none: else that one teaches, and it is said."""
    recipe = str(write_recipe(trained.parent, distill=settings, train={"train_iters": 1}))
    earlier = str(trained / "pretrain" / "checkpoints" / "step_00000003")

    def taught_by(*arguments: str) -> str:
        assert largeformer("distill", "-c", recipe, "--fresh", *arguments) == 0
        return json.loads((trained / "distill" / "origin.json").read_text())["teacher_checkpoint"]  # type: ignore[no-any-return]

    assert taught_by("--from", earlier) == "step_00000003"
    assert taught_by("--from", str(trained)) == "step_00000004"
    assert "not --from" not in capsys.readouterr().out
    assert taught_by("--from", earlier, "distill.teacher=pretrain") == "step_00000004"
    assert f"the teacher is distill.teacher pretrain, not --from {earlier}" in capsys.readouterr().out


def test_another_tokenizer_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "teachers")
    for run, digest in ((trained, "1111"), (tmp_path / "teachers", "2222")):
        path = run / "prepare" / "manifest.json"
        path.write_text(json.dumps({**(held := json.loads(path.read_text())), "metrics": {**held["metrics"], "tokenizer_sha256": digest}}))
    recipe = write_recipe(trained.parent, distill={"teacher": str(tmp_path / "teachers")})
    assert largeformer("distill", "-c", str(recipe)) == 2
    assert "the teacher reads by another tokenizer (2222) than this run's text was cut by (1111)" in capsys.readouterr().err


def test_another_vocabulary_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    recipe = write_recipe(other, tokenizer={"vocab_size": 240}, distill={"teacher": str(trained)})
    assert largeformer("distill", "-c", str(recipe)) == 2
    assert "this run has a vocabulary of 240 ids (tokenizer.vocab_size) and the teacher one of 250" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "there", "expected"),
    [
        pytest.param(10, 12, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11], id="10 of 12"),
        pytest.param(6, 12, [0, 2, 4, 7, 9, 11], id="6 of 12"),
        pytest.param(1, 12, [0], id="one"),
        pytest.param(4, 4, [0, 1, 2, 3], id="all"),
    ],
)
def test_layers_are_spread_evenly(layers: int, there: int, expected: list[int]) -> None:
    recipe = tiny_recipe(distill={"student": {"init": "teacher_layers", "model": {"num_layers": layers}}})
    assert list(chosen_layers(recipe, there)) == expected


def test_pairs_are_spread_evenly_and_stay_on_their_stage() -> None:
    pp2 = {"pipeline_model_parallel_size": 2}
    student = tiny_recipe(distill={"hidden": {}}, model={"num_layers": 2}, parallel=pp2)
    teacher = tiny_recipe(model={"num_layers": 4}, parallel=pp2)
    assert pairs_of(student, teacher) == ((0, 1), (1, 3))
    apart = tiny_recipe(distill={"hidden": {"layers": [[0, 2], [1, 3]]}}, model={"num_layers": 2}, parallel=pp2)
    with pytest.raises(BadInputError, match=r"\[\[0, 2\]\]: the two layers of a pair must lie on the same of .* 2 stages"):
        pairs_of(apart, teacher)
