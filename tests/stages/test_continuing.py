"""What a training that goes on takes over, and what it begins anew: its own, after an end in between, and another run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from largeformer import cli
from largeformer.artifact import Artifact
from largeformer.checkpoint.commit import SaveError
from largeformer.config.schema import Recipe
from largeformer.data.ramp import BatchSizes
from largeformer.stages.common import interruptions
from largeformer.stages.common.claim import claim
from largeformer.stages.common.feeding import samples_to_train_on
from largeformer.training import saving
from largeformer.training.checkpointing import Progress
from largeformer.training.rewind import Rewind, read_rewinds, write_rewinds
from tests.commands import run_command
from tests.recipes import TINY

AT_ONCE = {"patience": 1, "min_delta": 1000.0}  # the second validation improves on nothing


def pretrain(
    run: Path,
    steps: int,
    load: Path | None = None,
    model: dict[str, Any] | None = None,
    fresh: bool = False,
    guards: dict[str, Any] | None = None,
    ranks: int = 1,
    **train: Any,
) -> int:
    tree = {
        **TINY,
        "model": {**TINY["model"], **(model or {})},
        "run": {"name": run.name, "output_dir": str(run)},
        "train": {**TINY["train"], "train_iters": steps, "eval_interval": 1, "eval_iters": 1, **train},
        "checkpoint": {"save_interval": 1, "load": None if load is None else str(load)},
        "tracking": {"wandb": {"mode": "offline"}, "tensorboard": False},
        "guards": guards or {},
    }
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    command = ["pretrain", "-c", str(path), *(["--fresh"] if fresh else [])]
    return cli.main(command) if ranks == 1 else max(abs(one.returncode) for one in run_command(*command, ranks=ranks, timeout=60))


def state(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "pretrain" / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())  # type: ignore[no-any-return]


def last_step(run: Path) -> int:
    made = Artifact.read(run / "pretrain")
    assert made is not None
    return int(made.metrics["steps"])


@pytest.fixture(scope="module")
def stopped_early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("continuing") / "first"
    assert pretrain(run, 6, early_stopping=AT_ONCE) == 0
    assert last_step(run) == 2
    return run


def test_another_run_goes_on_under_a_record_and_with_a_patience_of_its_own(stopped_early: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "second", 6, stopped_early, early_stopping=AT_ONCE) == 0
    assert last_step(tmp_path / "second") == 4
    first, second = state(stopped_early, 2), state(tmp_path / "second", 4)
    assert first["wandb_run_id"] and second["wandb_run_id"] and first["wandb_run_id"] != second["wandb_run_id"]
    assert second["progress"]["samples"] == 16 and second["optimizer"]["steps"] == 4


def test_a_run_belongs_to_what_it_went_on_from(stopped_early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, second = tmp_path / "source", tmp_path / "second"
    shutil.copytree(stopped_early, source)
    assert pretrain(second, 4, source) == 0
    made = Artifact.read(second / "pretrain")
    assert made is not None and made.parents["pretrain"] == (Artifact.read(source / "pretrain") or made).identity
    assert pretrain(second, 4, stopped_early) == 2 and f"load was {source}, is {stopped_early}" in capsys.readouterr().err
    assert pretrain(second, 4, source) == 0 and last_step(second) == 4

    manifest = source / "pretrain" / "manifest.json"  # another model takes its place, as a second import would
    manifest.write_text(manifest.read_text().replace(made.parents["pretrain"], "2222"))
    assert pretrain(second, 4, source) == 2
    assert "went on from another pretrain" in (told := capsys.readouterr().err) and "(2222)" in told
    assert Artifact.read(second / "pretrain") == made
    assert pretrain(second, 4, source, fresh=True) == 0
    assert (second / "pretrain.old-1" / "manifest.json").exists() and last_step(second) == 4
    shutil.rmtree(source)
    assert pretrain(second, 4, source) == 0, "what has finished needs it no more"


def test_another_runs_spikes_are_its_own(stopped_early: Path, tmp_path: Path) -> None:
    assert pretrain(tmp_path / "second", 5, stopped_early) == 0
    window = [len(state(run, step)["extra"]["guards"]["spikes"]["losses"]) for run, step in ((stopped_early, 2), (tmp_path / "second", 5))]
    assert window == [2, 3]


def test_batches_of_another_size_go_on_behind_what_was_read(stopped_early: Path, tmp_path: Path) -> None:
    """Two steps of four samples each came first."""
    for name, size in (("smaller", 2), ("larger", 8)):
        assert pretrain(tmp_path / name, 6, stopped_early, global_batch_size=size) == 0
        assert state(tmp_path / name, 6)["progress"]["samples"] == 8 + 4 * size


def test_a_run_goes_on_where_its_source_is_gone(stopped_early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, second = tmp_path / "source", tmp_path / "second"
    shutil.copytree(stopped_early, source)
    identity = (Artifact.read(source / "pretrain") or pytest.fail("no manifest")).identity
    assert pretrain(second, 6, source, exit_iteration=4) == 0 and not (second / "pretrain" / "manifest.json").exists()
    manifest = source / "pretrain" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(identity, "2222"))
    assert pretrain(second, 6, source) == 2 and f"went on from another pretrain ({identity}) than stands in" in capsys.readouterr().err
    shutil.rmtree(source)
    assert pretrain(second, 6, source) == 0
    made = Artifact.read(second / "pretrain")
    assert made is not None and made.parents["pretrain"] == identity
    assert state(second, 6)["progress"] == {**state(second, 4)["progress"], "step": 6, "samples": 24} | {
        key: value for key, value in state(second, 6)["progress"].items() if key not in ("step", "samples")
    }


def test_two_ranks_go_on_from_another_run_and_from_their_own(stopped_early: Path, tmp_path: Path) -> None:
    """What rank 0 alone looks at calls no other rank."""
    assert pretrain(tmp_path / "second", 6, stopped_early, exit_iteration=4, ranks=2) == 0
    for _ in ("goes on", "has finished"):
        assert pretrain(tmp_path / "second", 6, stopped_early, ranks=2) == 0
    assert last_step(tmp_path / "second") == 6


def test_what_saved_nothing_belongs_to_no_source(stopped_early: Path, tmp_path: Path) -> None:
    """A source that another took the place of, before the first checkpoint, is simply gone on from."""
    second = tmp_path / "second"
    assert pretrain(second, 4, stopped_early) == 0
    shutil.rmtree(second / "pretrain" / "checkpoints")
    (second / "pretrain" / "manifest.json").unlink()
    noted = second / "pretrain" / "source.json"
    noted.write_text(noted.read_text().replace(json.loads(noted.read_text())["identity"], "2222"))
    assert pretrain(second, 4, stopped_early) == 0
    assert json.loads(noted.read_text())["identity"] == (Artifact.read(stopped_early / "pretrain") or pytest.fail("gone")).identity


REWINDING = {"spike_action": "rewind", "rewind_steps": 2}


@pytest.mark.parametrize("guards", [{}, REWINDING], ids=["logged", "rewound again"])
def test_what_another_run_left_out_is_read_past(guards: dict[str, Any], spikes: list[int], tmp_path: Path) -> None:
    spikes += [4, 9]  # the first run: three steps, the spike, then three from the checkpoint of step 3; the second: its second step
    assert pretrain(tmp_path / "first", 6, guards=REWINDING) == 0
    assert state(tmp_path / "first", 6)["progress"]["samples"] == 6 * 4 + 4
    assert pretrain(tmp_path / "second", 10, tmp_path / "first", guards=guards) == 0
    assert state(tmp_path / "second", 10)["progress"]["samples"] == 10 * 4 + 4 + (4 if guards else 0)
    assert len(read_rewinds(tmp_path / "second" / "pretrain")) == bool(guards)


def test_as_many_samples_are_asked_for_as_are_read_wherever_some_are_left_out() -> None:
    """Also where the ramp of batch sizes ends earlier for it, and behind another run, of another size."""
    train = {**TINY["train"], "train_iters": 40, "global_batch_size": 64, "rampup_batch_size": {"start": 8, "increment": 8, "samples": 400}}
    recipe = Recipe.model_validate({**TINY, "train": train, "guards": {"spike_action": "rewind", "rewind_steps": 3}})
    sizes = BatchSizes(recipe.train)

    def most_read(step: int, read: int) -> int:
        ends = []
        for left_out_at in range(step, 40):
            samples = read
            for at in range(step, 40):
                samples += 3 * 64 if at == left_out_at else 0
                samples += sizes.at(samples)
            ends.append(samples)
        return max(ends)

    for begun in ((0, 0), (4, 3000)):
        assert samples_to_train_on(recipe, *begun) == most_read(*begun)


def test_a_spike_behind_a_save_that_failed_is_gone_back_before(spikes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, begin = [], saving.begin

    def full_once(folder: Path, step: int) -> Path:
        begun.append(step)
        if begun.count(4) == 1 and step == 4:
            raise SaveError("step 4 was not saved: no space left")
        return begin(folder, step)

    monkeypatch.setattr(saving, "begin", full_once)
    spikes += [5]
    run = tmp_path / "run"
    assert pretrain(run, 8, guards={"spike_action": "rewind", "rewind_steps": 6}) == 0
    events = [json.loads(line) for line in (run / "pretrain" / "events.jsonl").read_text().splitlines()]
    assert begun == [1, 2, 3, 4, 4, 5, 6, 7, 8] and [event["step"] for event in events if event["event"] == "rewound"] == [3]


def test_what_another_recipe_left_out_is_not_left_out(tmp_path: Path) -> None:
    """Of a training that ended before it had saved anything: the same recipe still leaves it out."""
    folder, recipe = tmp_path / "pretrain", Recipe.model_validate(TINY)
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"seed": 7})})
    claim(folder, recipe, "pretrain", fresh=False)
    write_rewinds(folder, [Rewind(1, 2, 0, 8, 9.0, 30.0)])
    claim(folder, recipe, "pretrain", fresh=False)
    assert len(read_rewinds(folder)) == 1
    claim(folder, other, "pretrain", fresh=False)
    assert read_rewinds(folder) == []


def test_what_had_stopped_early_trains_no_further(stopped_early: Path) -> None:
    """Killed after its last checkpoint, and before it had finished."""
    (stopped_early / "pretrain" / "manifest.json").unlink()
    assert pretrain(stopped_early, 6, early_stopping=AT_ONCE) == 0
    assert last_step(stopped_early) == 2


def test_a_run_with_dropout_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """All of it: what is measured at the start of a process draws no random numbers of the training's."""
    found = []
    for name, stops in (("whole", [None]), ("halves", [2, None])):
        for stop in stops:
            assert pretrain(tmp_path / name, 4, model={"hidden_dropout": 0.1, "attention_dropout": 0.1}, exit_iteration=stop) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        found.append([row["val_loss"] for row in rows if "val_loss" in row])
    assert len(found[0]) == 4 and found[0] == found[1]


def test_a_checkpoint_beyond_the_end_is_refused(stopped_early: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(tmp_path / "short", 2, stopped_early) == 2
    assert "is of step 2, and train.train_iters is 2, which counts from 0: set it to more" in capsys.readouterr().err
    assert not (tmp_path / "short" / "pretrain" / "config.yaml").exists()


def test_a_run_that_goes_on_from_another_leaves_out_what_came_since(tmp_path: Path) -> None:
    """It has no checkpoint of its own yet."""
    world: Any = SimpleNamespace(from_main=lambda call: call())
    guards: Any = SimpleNamespace(spike=SimpleNamespace(step=520, end=8320, loss=9.0, z_score=30.0))
    interruptions.rewind(world, tmp_path, guards, Progress(step=500, samples=8000), 8 * 64)
    (made,) = read_rewinds(tmp_path)
    assert (made.step, made.first, made.end) == (500, 8000, 8320)
