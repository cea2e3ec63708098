"""W&B runs, read back from the file that `wandb sync` sends: no network, no key."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from largeformer.artifact import Artifact
from largeformer.config.tracking import TrackingConfig, WandbConfig
from largeformer.tracking import wandb as adapter
from largeformer.tracking.build import build_trackers, record_artifact
from largeformer.tracking.jsonl import JsonlTracker
from largeformer.tracking.wandb import WandbTracker, _end_service
from largeformer.tracking.wandb_login import has_key, login_problems
from tests.tracking.wandb_records import config, header, history, only_run, runs


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


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we said; W&B's own loggers speak too."""
    return [record.message for record in caplog.records if record.name.startswith("largeformer")]


def test_an_offline_run_holds_rows_config_names_and_samples(tmp_path: Path) -> None:
    settings = WandbConfig(project="p", entity="e", group="g", tags=("a", "b"))
    tracker = WandbTracker(settings, tmp_path, "tp2", {"recipe": {"model": {"hidden_size": 256}}}, run_id="abc123")
    tracker.log({"step": 10, "loss": 6.5, "loss_scale": None, "tokens": 640, "plan/memory_gib": 2.0})
    tracker.log({"step": 10, "val_loss": 6.25})
    tracker.event("saved", 10, path="checkpoints/step_00000010")
    tracker.sample(10, "def f(", "x):")
    tracker.close("finished")
    run = only_run(tmp_path)
    *rows, sample = history(run)
    axes = {"step": 10, "train/tokens": 640}
    assert rows == [{**axes, "train/loss": 6.5, "plan/memory_gib": 2.0}, {**axes, "val/loss": 6.25}, {**axes, "events/saved": 1}]
    (table,) = tmp_path.glob("wandb/*run-*/files/media/table/*.json")
    assert json.loads(table.read_text()) == {"columns": ["step", "prompt", "text"], "data": [[10, "def f(", "x):"]]}
    assert (sample["step"], sample["samples/nrows"]) == (10, 1)
    top = header(run)
    assert (top.run_id, top.project, top.entity, top.display_name, top.run_group) == ("abc123", "p", "e", "tp2", "g")
    assert [*top.tags] == ["a", "b"]
    assert config(run) == {"recipe": {"model": {"hidden_size": 256}}}
    steps = {(r.metric.name or r.metric.glob_name): r.metric.step_metric for r in run if r.HasField("metric")}
    assert steps["*"] == steps["train/tokens"] == "step"


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("requeue", 1)])
def test_the_exit_code_says_how_it_ended(status: str, code: int, tmp_path: Path) -> None:
    WandbTracker(WandbConfig(), tmp_path, "r", {}, "abc").close(status)
    run = only_run(tmp_path)
    assert [record.exit.exit_code for record in run if record.HasField("exit")] == [code]
    assert any(record.HasField("preempting") for record in run) == (status == "requeue")


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    build: dict[str, Any] = {"run_name": "r", "record": {}, "total_steps": 4}
    tracking = TrackingConfig(tensorboard=False)
    trackers = build_trackers(tracking, first, resume_step=0, **build)
    trackers.close("requeue")
    run_id = trackers.wandb_run_id
    resumed = build_trackers(tracking, second, resume_step=2, wandb_run_id=run_id, **build)
    resumed.close("finished")
    assert run_id is not None
    for folder in (first, second):
        assert [record.run.run_id for record in only_run(folder) if record.HasField("run")] == [run_id]


def test_online_without_a_key_is_told_before_work_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert login_problems("offline") == login_problems("disabled") == []
    (problem,) = login_problems("online")
    assert "there is no key for api." in problem and "set WANDB_API_KEY" in problem
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert login_problems("online") == []


KILLED = """
import os, signal, sys, time
from pathlib import Path
from largeformer.config.tracking import TrackingConfig
from largeformer.tracking.build import build_trackers, record_artifact
from largeformer.tracking.wandb_file import logged_rows
trackers = build_trackers(TrackingConfig(tensorboard=False), Path(sys.argv[1]), "r", {}, 0, 9, wandb_run_id="abc")
for step in range(1, 6):
    trackers.log({"step": step, "loss": 9.0 - step, "lr": 0.1, "tokens": 64 * step})
    if step in (2, 4):
        trackers.log({"step": step, "val_loss": 9.5 - step})
while sys.argv[2] == "written" and sum("val/loss" in row for row in logged_rows(Path(sys.argv[1]), "abc")) < 2:
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("before", ["written", "at once"])
def test_a_killed_and_resumed_run_has_one_history_without_gap_or_double_step(before: str, tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 3: whatever the first process got written, each step is there once."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), before], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    trackers = build_trackers(TrackingConfig(tensorboard=False), tmp_path, "r", {}, resume_step=3, total_steps=9, wandb_run_id="abc")
    for step in range(4, 10):
        trackers.log({"step": step, "loss": 9.0 - step, "lr": 0.1, "tokens": 64 * step})
        if step % 2 == 0:
            trackers.log({"step": step, "val_loss": 9.5 - step})
    trackers.close("finished")
    processes = runs(tmp_path)
    rows = [row for process in processes for row in history(process)]
    assert len(processes) == 2 and {header(process).run_id for process in processes if process} == {"abc"}
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(step, 9.0 - step) for step in range(1, 10)]
    assert [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row] == [(step, 9.5 - step) for step in (2, 4, 6, 8)]
    assert [row["train/tokens"] for row in rows if "val/loss" in row] == [64 * step for step in (2, 4, 6, 8)]


def test_what_an_earlier_process_lost_is_taken_from_the_metrics(tmp_path: Path) -> None:
    """No file of W&B's is left (it failed to start, or was on another disk): the resumed process logs what came before."""
    record = JsonlTracker(tmp_path, 0)
    for step in (1, 2):
        record.log({"step": step, "loss": 1.0 * step, "lr": 0.1})
    record.close("failed")
    tracker = WandbTracker(WandbConfig(), tmp_path, "r", {}, "abc", resume_step=2)
    tracker.log({"step": 3, "loss": 3.0, "lr": 0.1})
    tracker.close("finished")
    assert [row["train/loss"] for row in history(only_run(tmp_path))] == [1.0, 2.0, 3.0]


def test_going_back_within_a_process_is_logged(tmp_path: Path) -> None:
    """After a spike training may go back to a checkpoint: these are other values, not the same again."""
    tracker = WandbTracker(WandbConfig(), tmp_path, "r", {}, "abc")
    for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0)):
        tracker.log({"step": step, "loss": loss, "lr": 0.1})
    tracker.close("finished")
    assert [row["train/loss"] for row in history(only_run(tmp_path))] == [3.0, 9.0, 2.0]


def test_alerts(tmp_path: Path) -> None:
    tracker = WandbTracker(WandbConfig(), tmp_path, "r" * 70, {}, "abc")
    tracker.event("skipped", 6, loss_scale=1024.0)
    for kind in ("saved", "spike", "stalled", "checkpoint failed"):
        tracker.event(kind, 7, z=9.5)
    tracker.event("nonfinite", 8, what="loss", in_a_row=1)
    tracker.close("finished")
    alerts = [record.alert for record in only_run(tmp_path) if record.HasField("alert")]
    assert [alert.level for alert in alerts] == ["WARN", "ERROR", "ERROR", "ERROR", "INFO"]
    assert alerts[0].text == "At step 7: z 9.5" and all(len(alert.title) < 64 for alert in alerts)


def test_artifacts_and_their_lineage(tmp_path: Path) -> None:
    prepared = Artifact("prepare", tmp_path / "prepare", "1" * 16).write()
    trained = Artifact("pretrain", tmp_path / "pretrain", "2" * 16, {"prepare": "1" * 16}, {"val_loss": 2.5}).write()
    tracker = WandbTracker(WandbConfig(), trained.path, "a run", {}, "abc")
    tracker.artifact(trained, [prepared])
    tracker.close("finished")
    used, made = (
        r.request.log_artifact.artifact if r.HasField("request") else r.artifact for r in only_run(trained.path) if is_artifact(r)
    )
    assert (used.name, used.type, used.use_after_commit) == ("a-run-prepare", "prepare", True)
    assert (made.name, made.type, made.use_after_commit) == ("a-run-pretrain", "pretrain", False)
    assert {*made.aliases} == {"latest", "2" * 16}
    assert json.loads(made.metadata)["parents"] == {"prepare": "1" * 16}
    assert json.loads(made.metadata)["metrics"] == {"val_loss": 2.5}
    assert [entry.path for entry in made.manifest.contents] == ["manifest.json"]
    assert made.manifest.contents[0].local_path == str(trained.path / "manifest.json")


def test_a_stage_that_trains_nothing_records_its_artifact_alone(tmp_path: Path) -> None:
    trained = Artifact("pretrain", tmp_path / "pretrain", "2" * 16).write()
    pruned = Artifact("prune", tmp_path / "prune-2", "3" * 16, {"pretrain": "2" * 16}, {"parameters_kept": 0.85}).write()
    record_artifact(TrackingConfig(wandb=WandbConfig(mode="offline")), "a run", {"recipe": {}}, pruned, [trained])
    records = list(only_run(pruned.path))
    used, made = (r.request.log_artifact.artifact if r.HasField("request") else r.artifact for r in records if is_artifact(r))
    assert (used.name, used.use_after_commit, made.name, made.type) == ("a-run-pretrain", True, "a-run-prune-2", "prune")
    assert [r.run.job_type for r in records if r.HasField("run")] == ["prune-2"]
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]
    record_artifact(TrackingConfig(wandb=WandbConfig(mode="disabled")), "a run", {}, trained, [])
    assert not (trained.path / "wandb").exists()


def is_artifact(record: Any) -> bool:
    return record.HasField("artifact") or (record.HasField("request") and record.request.HasField("log_artifact"))


CANARY = """
import sys
from pathlib import Path
from largeformer.config.tracking import WandbConfig
from largeformer.tracking.wandb import WandbTracker
tracker = WandbTracker(WandbConfig(), Path(sys.argv[1]), "r", {}, "abc")
tracker.log({"step": 1, "loss": 2.0, "lr": 0.1})
tracker.close("finished")
"""


def test_no_file_of_a_run_holds_a_secret(tmp_path: Path) -> None:
    """A secret in the environment, on the command line, in the remote address of the repository around, in the netrc file."""
    canary = "canary-3f9c1"
    work = tmp_path / "work"
    for arguments in (["init", "-q"], ["remote", "add", "origin", f"https://user:{canary}@example.org/x.git"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    (Path.home() / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {canary}\n")
    environ = {**os.environ, "SECRET_TOKEN": canary, "WANDB_API_KEY": canary * 5, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CANARY, str(work), f"--token={canary}"]
    subprocess.run(command, check=True, env=environ, cwd=tmp_path, timeout=300)
    files = [path for path in work.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if canary.encode() in path.read_bytes()] == []


DEAD = """
import os, signal, sys
from pathlib import Path
from largeformer.config.tracking import TrackingConfig
from largeformer.tracking.build import build_trackers, record_artifact
trackers = build_trackers(TrackingConfig(tensorboard=False), Path(sys.argv[1]), "r", {}, resume_step=0, total_steps=39)
trackers.log({"step": 1, "loss": 1.0})
for process in Path("/proc").glob("[0-9]*"):
    try:
        parent, command = (process / "stat").read_text().rsplit(")", 1)[1].split()[1], (process / "cmdline").read_bytes()
    except OSError:
        continue
    if parent == str(os.getpid()) and b"wandb-core" in command:
        os.kill(int(process.name), signal.SIGKILL)
        print("killed", flush=True)
for step in range(2, 40):
    trackers.log({"step": step, "loss": 1.0})
trackers.close("finished")
"""


def test_training_goes_on_when_wandb_dies(tmp_path: Path) -> None:
    """W&B's own process is killed in mid-run: one warning, the rest of the record is whole, and the program ends well."""
    done = subprocess.run([sys.executable, "-c", DEAD, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "killed" in done.stdout, done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 39
    assert done.stderr.count("WandbTracker cannot record") == 1


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


GONE = """
import os, sys
from pathlib import Path
from largeformer.config.tracking import TrackingConfig, WandbConfig
from largeformer.tracking import wandb as adapter
from largeformer.tracking.build import build_trackers, record_artifact
from tests.tracking.wandb_server import wandb_server
adapter.FINISH_SECONDS = 3.0
tracking = TrackingConfig(wandb=WandbConfig(mode="online"), tensorboard=False)
with wandb_server() as server:
    os.environ.update(WANDB_BASE_URL=server.url, WANDB_API_KEY="0" * 40)
    trackers = build_trackers(tracking, Path(sys.argv[1]), "r", {"layout": {"tensor": 2}}, 0, 4, wandb_run_id="abc")
    trackers.log({"step": 1, "loss": 4.0, "lr": 0.1})
    print(server.runs["abc"].upserts[-1]["config"])
for step in (2, 3, 4):
    trackers.log({"step": step, "loss": 5.0 - step, "lr": 0.1})
trackers.close("finished")
"""


def test_a_thread_that_ends_while_the_service_is_looked_for_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "0"]))
    _end_service()


def test_a_network_that_dies_in_mid_run_stops_nothing(tmp_path: Path) -> None:
    """Online, and the server goes away: the end gives up waiting, the program ends, and the file here holds everything."""
    command = [sys.executable, "-c", GONE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert '"layout":{"value":{"tensor":2}}' in done.stdout.replace(" ", "")
    assert done.stderr.count("WandbTracker cannot record (TimeoutError: the last upload") == 1
    assert [row["train/loss"] for row in history(only_run(tmp_path, "run")) if "train/loss" in row] == [4.0, 3.0, 2.0, 1.0]


NETRC = "machine api.wandb.ai\n  login user\n  password 0123\n"


@pytest.mark.parametrize(
    ("variables", "netrc_text", "host", "found"),
    [
        ({}, None, "api.wandb.ai", False),
        ({"WANDB_API_KEY": "0123"}, None, "api.wandb.ai", True),
        ({"WANDB_API_KEY": ""}, None, "api.wandb.ai", False),
        ({}, NETRC, "api.wandb.ai", True),
        ({}, NETRC, "api.forge.coreweave.com", True),
        ({}, NETRC, "wandb.example.org", False),
        ({}, "machine\n", "api.wandb.ai", False),
    ],
    ids=["nothing", "variable", "empty variable", "netrc", "netrc, the service's other name", "netrc of another server", "broken netrc"],
)
def test_keys(variables: dict[str, str], netrc_text: str | None, host: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if netrc_text is not None:
        file = Path.home() / ".netrc"
        file.write_text(netrc_text)
        file.chmod(0o600)
    assert has_key(host) == found
