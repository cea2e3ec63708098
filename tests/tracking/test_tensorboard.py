"""TensorBoard's files, read back by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from largeformer.tracking.tensorboard import TensorBoardTracker


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def curve(folder: Path, chart: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read(folder).Scalars(chart)]


def test_rows_events_and_samples_are_charted(tmp_path: Path) -> None:
    tracker = TensorBoardTracker(tmp_path, resume_step=0)
    tracker.log({"step": 1, "loss": 6.5, "lr": 0.25, "mfu": None, "memory_gib": 1.5, "tokens_per_s": 4096.0})
    tracker.log({"step": 1, "val_loss": 6.25, "val_bits_per_byte": 2.5})
    tracker.event("saved", 1, path="checkpoints/step_00000001")
    tracker.sample(1, "def f(", "x):\n  # $a$ *b*")
    tracker.close("finished")
    charts = read(tmp_path).Tags()["scalars"]
    assert {*charts} == {
        "train/loss",
        "train/lr",
        "memory/peak_gib",
        "perf/tokens_per_s",
        "val/loss",
        "val/bits_per_byte",
        "events/saved",
    }
    assert (curve(tmp_path, "train/loss"), curve(tmp_path, "val/loss")) == ([(1, 6.5)], [(1, 6.25)])
    (text,) = read(tmp_path).Tensors("sample/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "    def f(x):\n      # $a$ *b*"


@pytest.mark.parametrize(("resume_step", "steps"), [(2, [1, 2, 3, 4]), (0, [1, 2])], ids=["resumed at 2", "started again"])
def test_what_was_charted_after_the_checkpoint_is_hidden(resume_step: int, steps: list[int], tmp_path: Path) -> None:
    """A first process reaches step 5; the next goes on from `resume_step` for two steps, with other losses."""
    for start, count, loss in ((0, 5, 1.0), (resume_step, 2, 2.0)):
        tracker = TensorBoardTracker(tmp_path, start)
        for step in range(start + 1, start + 1 + count):
            tracker.log({"step": step, "loss": loss})
        tracker.close("finished")
        # The reader orders files by name, and names begin with the second in which they were made.
        for file in tmp_path.glob("events*"):
            if loss == 1.0:
                file.rename(file.with_name("events.out.tfevents.0000000000.first"))
    assert curve(tmp_path, "train/loss") == [(step, 1.0 if step <= resume_step else 2.0) for step in steps]
