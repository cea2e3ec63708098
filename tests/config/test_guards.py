"""The section `guards`: what is refused, in a sentence, and what it means for a run's identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.config.load import load_recipe
from tests.config.recipes import problems_of, write_recipe
from tests.recipes import tiny_recipe

REWIND = ["guards.spike_action=rewind", "checkpoint.save_interval=50"]


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        pytest.param(
            ["guards.watchdog_timeout=3"],
            ["unknown key guards.watchdog_timeout; did you mean guards.watchdog_timeout_s?"],
            id="unknown key",
        ),
        pytest.param(["guards.watchdog_timeout_s=0"], ["guards.watchdog_timeout_s is 0, which should be above 0"], id="no time at all"),
        pytest.param(
            ["guards.watchdog_timeout_s=.inf"], ["guards.watchdog_timeout_s is inf, which should be a finite number"], id="for ever"
        ),
        pytest.param(["guards.max_consecutive_skips=0"], ["guards.max_consecutive_skips is 0, which should be above 0"], id="no skip"),
        pytest.param(["guards.straggler_ratio=1.0"], ["guards.straggler_ratio is 1.0, which should be above 1"], id="every rank is slow"),
        pytest.param(["guards.replica_interval=-5"], ["guards.replica_interval is -5, which should be above 0"], id="negative interval"),
        pytest.param(
            ["guards.spike_action=rewnd"], ["guards.spike_action is 'rewnd', which is none of log, rewind; did you mean"], id="slip"
        ),
        pytest.param(["guards.spike_window=5"], ["guards.spike_window 5 is too short to tell a spike from noise"], id="short window"),
        pytest.param(REWIND[:1], ["guards.spike_action rewind needs a checkpoint to go back to"], id="nowhere to rewind to"),
        pytest.param(
            [*REWIND, "guards.spike_z_score=null"], ["guards.spike_action rewind needs guards.spike_z_score"], id="nothing to rewind for"
        ),
        pytest.param(
            [*REWIND, "guards.rewind_steps=49"], ["guards.rewind_steps 49 is below checkpoint.save_interval 50"], id="too far back"
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, overrides: list[str], problems: list[str]) -> None:
    found = problems_of(tmp_path, *overrides)
    assert len(found) == len(problems), found
    for sentence, expected in zip(found, problems, strict=True):
        assert sentence.startswith(expected), sentence


@pytest.mark.parametrize(
    "overrides", [["guards.spike_window=5", "guards.spike_z_score=null"], REWIND], ids=["no spike, no window", "rewind"]
)
def test_what_is_not(tmp_path: Path, overrides: list[str]) -> None:
    load_recipe(write_recipe(tmp_path), overrides)


def test_only_guards_that_leave_samples_out_belong_to_the_identity() -> None:
    plain = tiny_recipe().identity("pretrain")
    assert tiny_recipe(guards={"watchdog_timeout_s": 5.0, "spike_z_score": None, "replica_interval": None}).identity("pretrain") == plain
    rewinding = tiny_recipe(guards={"spike_action": "rewind"}).identity("pretrain")
    assert rewinding != plain
    assert tiny_recipe(guards={"spike_action": "rewind", "rewind_steps": 7}).identity("pretrain") != rewinding
