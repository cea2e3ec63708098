"""The curve of a small model over a small committed text, from text to tokenizer, samples, engine and metrics; see tests/golden/make.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed import RankPool
from tests.golden.make import LOSSES, RECIPE, TEXT, compose, curve


def test_the_text_is_what_its_grammar_makes() -> None:
    assert TEXT.read_text() == compose()


def test_the_curve_is_the_golden_one(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    golden = json.loads(LOSSES.read_text())
    found = ranks(1).run(curve, tmp_path)[0]
    assert len(golden["loss"]) == RECIPE["train"]["train_iters"]
    assert found["loss"] == pytest.approx(golden["loss"], abs=1e-4)
    assert found["val_loss"] == pytest.approx(golden["val_loss"], abs=1e-4)


def test_the_golden_curve_learns() -> None:
    golden = json.loads(LOSSES.read_text())
    assert golden["loss"][0] == pytest.approx(6.2146, abs=0.05)  # ln 500: it starts from chance
    assert golden["loss"][-1] < golden["loss"][0] - 2
    assert golden["val_loss"]["20"] < golden["val_loss"]["10"]
