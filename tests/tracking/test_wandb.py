"""W&B runs, read back from the file that `wandb sync` sends: no network, no key."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from largeformer.config.schema import TrackingConfig, WandbConfig
from largeformer.tracking import wandb as adapter
from largeformer.tracking.build import build_trackers
from largeformer.tracking.wandb import WandbTracker, has_key


@pytest.fixture(autouse=True)
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home without a netrc file, an environment without a key: whoever runs the tests lends nothing to them."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    yield
    wandb.teardown()  # what W&B read of this environment must not reach another test


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """The records of a `.wandb` file: LevelDB's log format, 32 KiB blocks of [checksum, length, type, data], behind 7 bytes of header."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)


def only_run(folder: Path, kind: str = "*run") -> list[wandb_internal_pb2.Record]:
    wandb.teardown()  # `finish` may return before W&B's own process has written the file; its end waits for that
    (path,) = folder.glob(f"wandb/{kind}-*/*.wandb")
    return [*records(path)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we said; W&B's own loggers speak too."""
    return [record.message for record in caplog.records if record.name.startswith("largeformer")]


def history(run: list[wandb_internal_pb2.Record]) -> list[dict[str, Any]]:
    """What was logged, W&B's own columns (underscored) left out."""
    found = [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item} for r in run if r.HasField("history")]
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in found]


def test_an_offline_run_holds_rows_config_names_and_samples(tmp_path: Path) -> None:
    config = WandbConfig(project="p", group="g", tags=("a", "b"))
    tracker = WandbTracker(config, tmp_path, "tp2", {"model": {"hidden_size": 256}}, run_id="abc123")
    tracker.log({"step": 10, "loss": 6.5, "loss_scale": None})
    tracker.log({"step": 10, "val_loss": 6.25})
    tracker.event("saved", 10, path="checkpoints/step_00000010")
    tracker.sample(10, "def f(", "x):")
    tracker.close("finished")
    run = only_run(tmp_path)
    *rows, sample = history(run)
    assert rows == [{"step": 10, "train/loss": 6.5}, {"step": 10, "val/loss": 6.25}, {"step": 10, "events/saved": 1}]
    (table,) = tmp_path.glob("wandb/*run-*/files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["step", "prompt", "text"], "data": [[10, "def f(", "x):"]]}
    assert (sample["step"], sample["samples/nrows"]) == (10, 1)
    (header,) = (record.run for record in run if record.HasField("run"))
    assert (header.run_id, header.project, header.display_name, header.run_group) == ("abc123", "p", "tp2", "g")
    assert [*header.tags] == ["a", "b"]
    recipe = {item.key: json.loads(item.value_json) for item in header.config.update if not item.key.startswith("_")}
    assert recipe == {"model": {"hidden_size": 256}}
    axes = {(r.metric.name or r.metric.glob_name): r.metric.step_metric for r in run if r.HasField("metric")}
    assert axes["*"] == "step"


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("requeue", 1)])
def test_the_exit_code_says_how_it_ended(status: str, code: int, tmp_path: Path) -> None:
    WandbTracker(WandbConfig(), tmp_path, "r", {}, "abc").close(status)
    run = only_run(tmp_path)
    assert [record.exit.exit_code for record in run if record.HasField("exit")] == [code]
    assert any(record.HasField("preempting") for record in run) == (status == "requeue")


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    build = {"run_name": "r", "config": {}, "total_steps": 4}
    tracking = TrackingConfig(tensorboard=False)
    trackers = build_trackers(tracking, first, resume_step=0, **build)
    trackers.close("requeue")
    run_id = trackers.wandb_run_id
    resumed = build_trackers(tracking, second, resume_step=2, wandb_run_id=run_id, **build)
    resumed.close("finished")
    assert run_id is not None
    for folder in (first, second):
        assert [record.run.run_id for record in only_run(folder) if record.HasField("run")] == [run_id]


def test_online_without_a_key_is_recorded_offline_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracker(WandbConfig(mode="online"), tmp_path, "r", {}, "abc")
    tracker.close("finished")
    assert ["there is no key for" in warning for warning in warnings(caplog)] == [True]
    assert only_run(tmp_path, "offline-run")


def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setattr(adapter, "START_SECONDS", 1.0)
    wandb.teardown()
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracker(WandbConfig(mode="online"), tmp_path, "r", {}, "abc")
    tracker.log({"step": 1, "loss": 2.0})
    tracker.close("finished")
    assert ["W&B cannot be reached" in warning for warning in warnings(caplog)] == [True]
    assert history(only_run(tmp_path, "offline-run")) == [{"step": 1, "train/loss": 2.0}]


NETRC = "machine api.wandb.ai\n  login user\n  password 0123\n"


@pytest.mark.parametrize(
    ("variables", "netrc_text", "host", "found"),
    [
        ({}, None, "api.wandb.ai", False),
        ({"WANDB_API_KEY": "0123"}, None, "api.wandb.ai", True),
        ({"WANDB_API_KEY": ""}, None, "api.wandb.ai", False),
        ({}, NETRC, "api.wandb.ai", True),
        ({}, NETRC, "wandb.example.org", False),
        ({}, "machine\n", "api.wandb.ai", False),
    ],
    ids=["nothing", "variable", "empty variable", "netrc", "netrc of another server", "broken netrc"],
)
def test_keys(variables: dict[str, str], netrc_text: str | None, host: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc_text is not None:
        file = Path.home() / ".netrc"
        file.write_text(netrc_text)
        file.chmod(0o600)
    assert has_key(host) == found
