"""A file of each kind truncated, flipped by a bit, or deleted: refused by name, and the checkpoint before it used. And lists that lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from largeformer.checkpoint.manifest import DamagedError, read_manifest
from largeformer.checkpoint.verify import checkpoint_problems, find, quick_problems
from largeformer.errors import BadInputError
from tests.checkpoint.folders import save
from tests.distributed import RankContext, RankPool

Ranks = Callable[[int], RankPool]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "a bit flipped": flip, "deleted": Path.unlink}
FILES = ["weights/rank_00000.safetensors", "state.json", "checksums.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (100, 200):
        save(tmp_path, step)
    return tmp_path


def problems_and_find(ranks: RankContext, folder: Path) -> tuple[list[str], str, list[str]]:
    found = find(folder)
    return checkpoint_problems(folder / "step_00000200"), found.checkpoint.name, [str(refused) for refused in found.refused]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_the_one_before_is_used(ranks: Ranks, folder: Path, damage: str, name: str, world_size: int) -> None:
    DAMAGES[damage](folder / "step_00000200" / name)
    for problems, found, refused in ranks(world_size).run(problems_and_find, folder):
        assert problems and name in problems[0]
        assert found == "step_00000100"
        assert len(refused) == 1 and refused[0].startswith("step_00000200 is damaged: ") and name in refused[0]


def test_without_hashes_sizes_still_count(folder: Path) -> None:
    flip(folder / "step_00000200" / FILES[0])
    assert find(folder, hashes=False).checkpoint.name == "step_00000200"
    truncate(folder / "step_00000200" / FILES[0])
    assert find(folder, hashes=False).checkpoint.name == "step_00000100"


def test_only_what_is_to_be_read_is_hashed(folder: Path) -> None:
    """A model for evaluation needs no moments; but a folder in which files are missing is not trusted."""
    flip(folder / "step_00000200" / "state.json")
    assert find(folder, below="weights/").checkpoint.name == "step_00000200"
    (folder / "step_00000200" / "state.json").unlink()
    assert find(folder, below="weights/").checkpoint.name == "step_00000100"


LATEST: dict[str, bytes | None] = {
    "empty": b"",
    "garbage": b"\x00\xff not a name",
    "naming nothing": b"step_00000700\n",
    "naming an older one": b"step_00000100\n",
    "naming another folder": b"../../etc\n",
    "deleted": None,
}


@pytest.mark.parametrize("content", LATEST.values(), ids=LATEST)
def test_latest_decides_nothing(folder: Path, content: bytes | None) -> None:
    (folder / "latest").unlink()
    if content is not None:
        (folder / "latest").write_bytes(content)
    assert find(folder).checkpoint.name == "step_00000200"


def test_a_checkpoint_that_was_named_is_not_replaced_by_another(folder: Path) -> None:
    flip(folder / "step_00000200" / FILES[0])
    with pytest.raises(BadInputError, match=r"step_00000200 is damaged: .*; name another"):
        find(folder / "step_00000200")
    assert find(folder / "step_00000100").checkpoint.name == "step_00000100"


def test_all_are_damaged(folder: Path) -> None:
    for step in (100, 200):
        truncate(folder / f"step_{step:08d}" / "state.json")
    with pytest.raises(BadInputError) as caught:
        find(folder)
    assert [problem.split()[0] for problem in caught.value.problems] == ["step_00000200", "step_00000100"]
    assert all("--fresh" in problem for problem in caught.value.problems)


def test_what_else_lies_in_the_folder_does_not_matter(folder: Path) -> None:
    (folder / "step_00000200" / "notes.txt").write_text("a good one")
    assert checkpoint_problems(folder / "step_00000200") == []


def entries(name: str) -> dict[str, Any]:
    return {"format": 1, "files": {name: {"size": 1, "sha256": "0" * 64}}}


LIES: dict[str, Any] = {
    "a path upward": entries("../../../etc/passwd"),
    "a path upward, later": entries("weights/../../latest"),
    "an absolute path": entries("/etc/passwd"),
    "no name": entries(""),
    "a NUL in the name": entries("a\0b"),
    "through a link": entries("elsewhere/passwd"),
    "a list": [1, 2],
    "another format": {"format": 99, "files": {}},
    "no sizes": {"format": 1, "files": {"state.json": {"sha256": "0" * 64}}},
    "a number for a file": {"format": 1, "files": {"state.json": 5}},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_list_that_lies_is_refused(folder: Path, lie: Any) -> None:
    checkpoint = folder / "step_00000200"
    (checkpoint / "elsewhere").symlink_to("/etc")
    (checkpoint / "checksums.json").write_text(json.dumps(lie))
    with pytest.raises(DamagedError, match=r"checksums\.json"):
        read_manifest(checkpoint)
    assert quick_problems(checkpoint) and find(folder).checkpoint.name == "step_00000100"
