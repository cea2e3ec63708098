"""The losses of a small run are those that they were: nothing between the text and the optimizer has moved unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.make import LOSSES, STEPS

ROOT = Path(__file__).parents[2]
SCRIPT = "import json, sys; from tests.golden.make import train; json.dump(train(sys.argv[1]), open(sys.argv[2], 'w'))"


def test_the_golden_curve(tmp_path: Path) -> None:
    """In a process of its own, as a user's run is: one thread, and no world left behind by another test."""
    output = tmp_path / "losses.json"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "run"), str(output)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr
    golden, found = json.loads(LOSSES.read_text()), json.loads(output.read_text())
    assert len(golden) == STEPS + 1 and golden[-1] < golden[0] - 0.5, "the curve is worth keeping: it learns"
    assert found == pytest.approx(golden, abs=1e-4)
