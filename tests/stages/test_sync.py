"""`largeformer sync` against a server on loopback, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from largeformer import cli
from largeformer.config.tracking import TrackingConfig
from largeformer.stages.sync import is_sent, recorded_runs
from largeformer.tracking.build import build_trackers
from largeformer.tracking.wandb_file import _pieces, has_ended
from tests.tracking.wandb_server import Server, wandb_server

ROOT = Path(__file__).parents[2]


def train(run: Path, steps: range, resume_step: int) -> None:
    """One process of a run of 9 steps, recorded offline."""
    tracking = TrackingConfig(tensorboard=False)
    trackers = build_trackers(tracking, run / "pretrain", "r", {"a": 1}, resume_step, 9, wandb_run_id="abc")
    for step in steps:
        trackers.log({"step": step, "loss": 9.0 - step, "lr": 0.1, "tokens": 64 * step})
    trackers.close("finished" if steps[-1] == 9 else "requeue")
    wandb.teardown()  # W&B's own process may be writing still


def sync(server: Server, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "HOME": str(home), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-m", "largeformer", "sync", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_of_two_processes_is_sent_as_one(tmp_path: Path) -> None:
    """Stopped at step 5, resumed from the checkpoint of step 3. Sent once: a second call has nothing to do."""
    run = tmp_path / "run"
    train(run, range(1, 6), 0)
    train(run, range(4, 10), 3)
    with wandb_server() as server:
        first = sync(server, tmp_path, str(run))
        assert first.returncode == 0 and "2 of 2 sent" in first.stdout, first.stdout + first.stderr
        second = sync(server, tmp_path, str(run))
        assert second.returncode == 0 and "nothing to send: 2 sent before" in second.stdout
    (sent,) = server.runs.values()
    assert [*server.runs] == ["abc"] and sent.sent == 9
    assert [(row["step"], row["train/loss"], row["train/tokens"]) for row in sent.rows()] == [(s, 9.0 - s, 64 * s) for s in range(1, 10)]
    assert not (ROOT / "wandb").exists(), "W&B writes its logs beside the run, not where the command is typed"
    counts = [row["_step"] for row in sent.rows()]
    assert counts == sorted({*counts}), "W&B's own count rises over both processes"
    assert sent.exit_codes == [1, 0]
    assert [(alert["title"], alert["severity"]) for alert in server.alerts] == [("r: finished", "INFO")]


def until_the_exit(whole: bytes) -> bytes:
    """A file as it is before its process says that it was done: a record before, each with 7 bytes in front."""
    ends = [piece for piece in _pieces(whole) if wandb_internal_pb2.Record.FromString(piece).HasField("exit")]  # type: ignore[attr-defined]
    return whole[: whole.rindex(ends[0]) - 7]


def test_what_is_still_being_written_is_sent_once_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that had no end yet is left for later; killed long ago, it is sent as it is; what is written after that is sent again."""
    run = tmp_path / "run"
    train(run, range(1, 10), 0)
    (folder,) = recorded_runs(run)
    (file,) = folder.glob("*.wandb")
    whole = file.read_bytes()
    file.write_bytes(until_the_exit(whole))
    assert not has_ended(folder)
    assert cli.main(["sync", str(run), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"{folder} is still being written" in told and "nothing to send: 0 sent before" in told
    os.utime(file, (1.0e9, 1.0e9))
    with wandb_server() as server:
        assert "1 of 1 sent" in sync(server, tmp_path, str(run)).stdout
        file.write_bytes(whole)
        assert has_ended(folder) and not is_sent(folder)
        assert "1 of 1 sent" in sync(server, tmp_path, str(run)).stdout
        assert is_sent(folder)
    (sent,) = server.runs.values()
    assert {row["step"] for row in sent.rows()} == set(range(1, 10))


def test_a_run_whose_sent_files_were_removed_goes_on_where_it_was(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(run, range(1, 6), 0)
    with wandb_server() as server:
        assert "1 of 1 sent" in sync(server, tmp_path, str(run)).stdout
        shutil.rmtree(run / "pretrain" / "wandb")
        train(run, range(4, 10), 3)
        assert "1 of 1 sent" in sync(server, tmp_path, str(run)).stdout
    (sent,) = server.runs.values()
    assert [row["step"] for row in sent.rows()] == list(range(1, 10))


def recorded(folder: Path) -> Path:
    """As a process leaves it that was killed long ago."""
    file = folder / f"run-{folder.name[-1]}.wandb"
    folder.mkdir(parents=True)
    file.touch()
    os.utime(file, (1.0e9, 1.0e9))
    return folder


OUTPUTS = {"online": ("run-1", True), "offline": ("offline-run-1", True), "offline alone": ("offline-run-1", False)}


@pytest.mark.parametrize(("name", "online"), OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_folder_may_be_named_like_a_recording(tmp_path: Path, name: str, online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(tmp_path / name / "pretrain" / "wandb" / "offline-run-20260101_000000-a")
    assert recorded_runs(tmp_path / name, online) == [run]
    assert recorded_runs(tmp_path, online) == []
    monkeypatch.chdir(run)
    assert recorded_runs(Path(), online) == [run]


def test_what_is_to_be_sent_is_found_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pretrain/wandb/offline-run-20260102_000000-b", "distill/wandb/offline-run-20260101_000000-a"):
        recorded(tmp_path / name)
    recorded(tmp_path / "pretrain" / "wandb" / "run-20260103_000000-c")
    later, earlier = tmp_path / "pretrain", tmp_path / "distill"
    assert [path.name[-1] for path in recorded_runs(tmp_path)] == ["a", "b"]
    assert [path.name[-1] for path in recorded_runs(later)] == [path.name[-1] for path in recorded_runs(later / "wandb")] == ["b"]
    assert recorded_runs(earlier / "wandb" / "offline-run-20260101_000000-a")[0].name.endswith("a")
    (recorded_runs(earlier)[0] / "run-a.wandb.synced").touch()
    assert [path.name[-1] for path in recorded_runs(tmp_path, online=True)] == ["a", "b", "c"]
    assert is_sent(recorded_runs(earlier)[0])
    assert cli.main(["sync", str(tmp_path), "--dry-run"]) == 0
    assert "1 of 2 offline runs wait to be sent" in capsys.readouterr().out
    assert cli.main(["sync", str(tmp_path), "--dry-run", "--again"]) == 0
    assert "2 of 2 offline runs wait to be sent" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "holds no offline run of W&B" in capsys.readouterr().err
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    recorded(tmp_path / "wandb" / "offline-run-20260101_000000-a")
    assert cli.main(["sync", str(tmp_path)]) == 2
    assert "there is no key for" in capsys.readouterr().err


def test_what_the_server_refuses_stays_to_be_sent(tmp_path: Path) -> None:
    train(tmp_path / "run", range(1, 10), 0)
    with wandb_server() as server:
        server.refusing = True
        done = sync(server, tmp_path, str(tmp_path / "run"))
    assert done.returncode == 1 and "0 of 1 sent; not sent: " in done.stdout
    assert not [path for path in tmp_path.rglob("*.synced")]
