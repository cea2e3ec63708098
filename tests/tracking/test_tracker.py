"""The fan-out: everyone hears everything, a failing tracker stops nobody; what `build_trackers` makes of a recipe."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from largeformer.config.tracking import TrackingConfig
from largeformer.tracking.build import build_trackers
from largeformer.tracking.jsonl import JsonlTracker
from largeformer.tracking.tracker import FanOut, chart_values


class Heard:
    """A tracker that remembers, and fails as often as told."""

    def __init__(self, failures: int = 0) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._failures = failures

    def _hear(self, *call: Any) -> None:
        if self._failures:
            self._failures -= 1
            raise ConnectionError("network is unreachable")
        self.calls.append(call)

    def log(self, row: Any) -> None:
        self._hear("log", dict(row))

    def event(self, kind: str, step: int, **fields: Any) -> None:
        self._hear("event", kind, step, fields)

    def sample(self, step: int, prompt: str, text: str) -> None:
        self._hear("sample", step, prompt, text)

    def close(self, status: str) -> None:
        self._hear("close", status)


def tell_everything(trackers: FanOut) -> list[tuple[Any, ...]]:
    trackers.log({"step": 1, "loss": 2.0})
    trackers.event("saved", 1, path="p")
    trackers.sample(1, "a", "b")
    trackers.close("finished")
    return [("log", {"step": 1, "loss": 2.0}), ("event", "saved", 1, {"path": "p"}), ("sample", 1, "a", "b"), ("close", "finished")]


def test_every_tracker_hears_everything() -> None:
    first, second = Heard(), Heard()
    told = tell_everything(FanOut([first, second]))
    assert first.calls == second.calls == told


def test_a_failing_tracker_stops_nobody_is_reported_once_and_may_recover(caplog: pytest.LogCaptureFixture) -> None:
    broken, sound = Heard(failures=2), Heard()
    with caplog.at_level(logging.WARNING):
        told = tell_everything(FanOut([broken, sound]))
    assert sound.calls == told
    assert broken.calls == told[2:]
    assert [record.message.split(";")[0] for record in caplog.records] == ["Heard cannot record (ConnectionError: network is unreachable)"]


def test_each_failing_tracker_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tell_everything(FanOut([Heard(failures=9), Heard(failures=9)]))
    assert len(caplog.records) == 2


def test_a_signal_is_not_swallowed() -> None:
    class Interrupted(Heard):
        def log(self, row: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FanOut([Interrupted()]).log({"step": 1})


def test_charts_leave_out_what_has_no_value_and_keep_what_has_no_name() -> None:
    row = {"step": 5, "loss": 2.0, "loss_scale": None, "skipped": 0, "val_loss": 2.5, "memory_gib": 1.0, "distillation_loss": 0.5}
    assert chart_values(row) == {
        "train/loss": 2.0,
        "train/skipped": 0,
        "val/loss": 2.5,
        "memory/peak_gib": 1.0,
        "train/distillation_loss": 0.5,
    }


QUIET = TrackingConfig.model_validate({"wandb": {"mode": "disabled"}, "tensorboard": False})


def build(folder: Path, tracking: TrackingConfig = QUIET, **changes: Any) -> FanOut:
    return build_trackers(tracking, folder, **{"run_name": "r", "record": {}, "resume_step": 0, "total_steps": 2, **changes})


def test_ranks_other_than_0_write_nothing_and_keep_the_run_id(tmp_path: Path) -> None:
    trackers = build(tmp_path, TrackingConfig(), enabled=False, wandb_run_id="abc")
    tell_everything(trackers)
    assert (list(tmp_path.iterdir()), trackers.wandb_run_id) == ([], "abc")


def test_a_recipe_without_charts_still_has_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_everything(build(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    assert "step 1/2  loss 2.0000" in capsys.readouterr().out


def test_tensorboard_that_cannot_start_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        tell_everything(build(tmp_path, TrackingConfig.model_validate({"wandb": {"mode": "disabled"}})))
    assert ["TensorBoard could not start" in record.message for record in caplog.records] == [True]
    assert (tmp_path / "metrics.jsonl").stat().st_size > 0


def test_a_folder_that_takes_no_record_stops_the_run_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "stage").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        build(tmp_path / "stage")


def test_a_closed_record_does_not_stop_who_still_talks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = FanOut([JsonlTracker(tmp_path, 0)])
    trackers.close("finished")
    with caplog.at_level(logging.WARNING):
        trackers.log({"step": 1})
    assert len(caplog.records) == 1
