from __future__ import annotations

import json
from typing import Any

import pytest

from tests.commands import run_command


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    (done,) = run_command(str(tmp_path_factory.mktemp("killed")), module="tests.stages.interruptions", timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("case", "kills"), [("alone", 5), ("two workers", 2), ("append", 4)])
def test_what_is_killed_and_run_again_comes_out_the_same(found: dict[str, dict[str, Any]], case: str, kills: int) -> None:
    assert found[case]["killed"] == kills
    assert found[case]["different"] == []
    assert found[case]["events"] > 50
    assert {"0-a.bin", "0-a.idx", "1-b.bin", "1-b.idx", "manifest.json", "quarantine.jsonl"} <= set(found[case]["files"])
    assert not any(name.startswith("work/") or ".tmp" in name for name in found[case]["files"])
