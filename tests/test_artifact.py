from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from largeformer import artifact
from largeformer.artifact import Artifact, identity_hash, library_versions, read_status, write_atomically, write_status
from largeformer.errors import BadInputError

DONE: dict[str, Any] = {"kind": "prepare", "identity": "00ff", "parents": {"a": "b"}, "metrics": {"tokens": 3}, "versions": {"x": "1"}}


def test_identity_is_the_hash_of_the_sorted_json() -> None:
    # The reference is written out by hand: keys sorted at every depth, no blanks.
    expected = hashlib.sha256(b'{"a":[1,2.5,null],"b":{"c":true,"d":"x"}}').hexdigest()[:16]
    assert identity_hash({"b": {"d": "x", "c": True}, "a": [1, 2.5, None]}) == expected
    assert identity_hash({"a": [1, 2.5, None], "b": {"c": True, "d": "y"}}) != expected


def test_an_artifact_reads_back_and_its_folder_may_be_moved(tmp_path: Path) -> None:
    written = Artifact(path=tmp_path / "prepare", **DONE).write()
    assert Artifact.read(tmp_path / "prepare") == written
    (tmp_path / "prepare").rename(tmp_path / "elsewhere")
    moved = Artifact.read(tmp_path / "elsewhere")
    assert moved == Artifact(path=tmp_path / "elsewhere", **DONE)
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "manifest.json").read_text()


def test_no_manifest_is_no_artifact(tmp_path: Path) -> None:
    assert Artifact.read(tmp_path) is None
    assert Artifact.read(tmp_path / "absent") is None
    assert read_status(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "named"),
    [
        pytest.param('{"kind": "prep', "manifest.json", id="half a file"),
        pytest.param("\xff\xfe", "manifest.json", id="not JSON"),
        pytest.param("[]", "list", id="not an object"),
        pytest.param(json.dumps(DONE | {"identity": 3}), "identity", id="wrong type"),
        pytest.param(json.dumps({"kind": "prepare"}), "identity, parents, metrics, versions", id="fields missing"),
    ],
)
def test_a_broken_manifest_is_bad_input(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BadInputError, match=named):
        Artifact.read(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "manifest.json"
    write_atomically(path, b"old")

    def no_rename(source: object, target: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(artifact.os, "replace", no_rename)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["manifest.json"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_written_file_has_the_mode_that_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_the_last_status_counts(tmp_path: Path) -> None:
    write_status(tmp_path / "run", "running", stage="prepare")
    first = read_status(tmp_path / "run")
    write_status(tmp_path / "run", "failed", stage="prepare", error="no text")
    last = read_status(tmp_path / "run")
    assert first is not None and last is not None
    assert (first["status"], last["status"], last["error"]) == ("running", "failed", "no text")
    assert last["time"] >= first["time"]


def test_versions_name_what_is_installed_and_leave_out_the_rest() -> None:
    versions = library_versions(["pytest", "no-such-distribution"])
    assert versions["pytest"] == pytest.__version__
    assert set(versions) == {"largeformer", "python", "pytest"}
