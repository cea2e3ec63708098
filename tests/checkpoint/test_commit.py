"""Folders that are a checkpoint or are not: whatever rank fails, waits, or has died."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from largeformer.checkpoint.commit import (
    SaveError,
    begin,
    candidates,
    commit,
    committed,
    newest,
    set_aside,
    stages_with_checkpoints,
    step_of,
    tidy,
)
from largeformer.checkpoint.verify import checkpoint_problems
from largeformer.errors import BadInputError
from tests.checkpoint.folders import save, write_part
from tests.distributed import RankContext, RankPool

Ranks = Callable[[int], RankPool]


def steps(folder: Path) -> list[int]:
    return [step_of(path) for path in committed(folder)]


def test_a_checkpoint_that_is_named_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = save(tmp_path / "checkpoints", 7)
    monkeypatch.chdir(checkpoint)
    assert candidates(Path()) == [checkpoint] and step_of(Path()) == 7
    monkeypatch.chdir(tmp_path)
    assert candidates(Path("checkpoints", checkpoint.name)) == [Path("checkpoints", checkpoint.name)]


def save_together(ranks: RankContext, folder: Path, step: int) -> str:
    temporary = begin(folder, step)
    return commit(temporary, write_part(temporary, ranks.rank, step)).name


def fail_together(ranks: RankContext, folder: Path, step: int, failing: int) -> str:
    temporary = begin(folder, step)
    files = write_part(temporary, ranks.rank, step)
    with pytest.raises(SaveError) as caught:
        commit(temporary, files, "No space left on device" if ranks.rank == failing else None)
    return str(caught.value)


def test_all_ranks_files_are_one_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert ranks(2).run(save_together, tmp_path, 100) == ["step_00000100"] * 2
    assert (tmp_path / "latest").read_text() == "step_00000100\n"
    found = {path.relative_to(tmp_path / "step_00000100").as_posix() for path in (tmp_path / "step_00000100").rglob("*") if path.is_file()}
    assert found == {"checksums.json", "state.json", "weights/rank_00000.safetensors", "weights/rank_00001.safetensors"}
    assert checkpoint_problems(tmp_path / "step_00000100") == []


@pytest.mark.parametrize("failing", [0, 1])
def test_every_rank_hears_of_one_that_fails(ranks: Ranks, tmp_path: Path, failing: int) -> None:
    ranks(2).run(save_together, tmp_path, 100)
    told = ranks(2).run(fail_together, tmp_path, 200, failing)
    assert told == [f"step 200 was not saved: rank {failing}: No space left on device"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100"]
    ranks(2).run(save_together, tmp_path, 200)
    assert steps(tmp_path) == [100, 200]


def commit_where_rank_0_cannot(ranks: RankContext, folder: Path) -> str:
    """The files are there, and the manifest cannot be written beside them."""
    temporary = begin(folder, 200)
    files = write_part(temporary, ranks.rank, 200)
    dist.barrier()
    if ranks.rank == 0:
        shutil.rmtree(temporary)
    with pytest.raises(SaveError) as caught:
        commit(temporary, files)
    return str(caught.value)


def test_a_failing_commit_is_told_too(ranks: Ranks, tmp_path: Path) -> None:
    for told in ranks(2).run(commit_where_rank_0_cannot, tmp_path):
        assert told.startswith("step 200 was not saved: rank 0: ") and "No such file" in told


def test_a_folder_that_cannot_be_made(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place")
    for told in ranks(2).run(begin_refused, tmp_path / "checkpoints"):
        assert told.startswith("step 1 was not saved: ")


def begin_refused(ranks: RankContext, folder: Path) -> str:
    with pytest.raises(SaveError) as caught:
        begin(folder, 1)
    return str(caught.value)


def save_with_a_late_rank(ranks: RankContext, folder: Path) -> list[str]:
    """Rank 1 writes only after rank 0 has been told, outside the commit, that it may look. What rank 0's folder held then."""
    temporary = begin(folder, 200)
    if ranks.rank == 0:
        files = write_part(temporary, 0, 200)
        seen = [*sorted(path.name for path in folder.iterdir()), (folder / "latest").read_text().strip()]
        dist.send(torch.zeros(1), dst=1)
    else:
        dist.recv(torch.zeros(1), src=0)
        seen = []
        files = write_part(temporary, 1, 200)
    commit(temporary, files)
    return seen


def test_latest_does_not_move_before_the_last_shard(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(save_together, tmp_path, 100)
    seen, _ = ranks(2).run(save_with_a_late_rank, tmp_path)
    assert seen == ["latest", "step_00000100", "step_00000200.tmp", "step_00000100"]
    assert (tmp_path / "latest").read_text() == "step_00000200\n"


def test_saved_again(tmp_path: Path) -> None:
    """After going back to an earlier step: the new one takes the place of the old."""
    save(tmp_path, 200, val_loss=3.0)
    save(tmp_path, 200, val_loss=2.0)
    assert '"val_loss": 2.0' in (tmp_path / "step_00000200" / "state.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000200"]


def test_tidy_removes_halves_and_puts_back_what_was_to_be_replaced(tmp_path: Path) -> None:
    """A process that died between the two renames of a commit has left the old one under another name, and nothing in its place."""
    for step in (100, 200):
        save(tmp_path, step)
    (tmp_path / "step_00000200").rename(tmp_path / "step_00000200.old")
    (tmp_path / "step_00000200.tmp").mkdir()
    (tmp_path / "step_00000300.tmp").mkdir()
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000100.old")
    shutil.copytree(tmp_path / "step_00000100", tmp_path / "step_00000050.dropped")
    tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100", "step_00000200"]


def test_set_aside(tmp_path: Path) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    assert set_aside(tmp_path / "step_00000200").name == "step_00000200.damaged"
    assert (tmp_path / "latest").read_text() == "step_00000100\n" and steps(tmp_path) == [100]
    save(tmp_path, 200)
    assert set_aside(tmp_path / "step_00000200").name == "step_00000200.damaged-2"


def test_a_latest_that_cannot_be_written_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest").mkdir()
    assert save(tmp_path, 100).name == "step_00000100"
    assert "cannot be made to name step_00000100" in caplog.text


def test_steps_beyond_eight_digits_are_in_order(tmp_path: Path) -> None:
    for step in (123_456_789, 99_999_999):
        save(tmp_path, step)
    assert steps(tmp_path) == [99_999_999, 123_456_789]


# What the user names, below the run's folder -> the checkpoints that may be meant.
NAMED = {
    "": [20, 10],
    "pretrain": [20, 10],
    "pretrain/checkpoints": [20, 10],
    "pretrain/checkpoints/step_00000010": [10],
}


@pytest.mark.parametrize("named", NAMED)
def test_candidates(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "pretrain" / "checkpoints"
    for step in (10, 20):
        save(folder, step)
    (folder / "step_00000030.tmp").mkdir()
    (folder / "step_00000040.damaged").mkdir()
    (folder / "step_40").mkdir()
    (folder / "step_00000050").touch()
    assert candidates(tmp_path / named) == [folder / f"step_{step:08d}" for step in NAMED[named]]


def test_a_run_with_several_stages_means_none_of_them(tmp_path: Path) -> None:
    for stage in ("pretrain", "distill", "pretrain.old-1"):
        save(tmp_path / stage / "checkpoints", 10)
    with pytest.raises(BadInputError, match=r"several stages \(distill, pretrain\): name one, as in .*/pretrain"):
        candidates(tmp_path)
    named = [[path.parent.parent.name for path in found] for found in stages_with_checkpoints(tmp_path)]
    assert named == [["distill"], ["pretrain"]]
    assert candidates(tmp_path / "pretrain.old-1") == [tmp_path / "pretrain.old-1" / "checkpoints" / "step_00000010"]


@pytest.mark.parametrize("named", ["", "nowhere", "prepare", "prepare/step_00000030.tmp"])
def test_no_candidates(tmp_path: Path, named: str) -> None:
    (tmp_path / "prepare" / "step_00000030.tmp").mkdir(parents=True)
    with pytest.raises(BadInputError, match="holds no checkpoint: name a run"):
        candidates(tmp_path / named)
