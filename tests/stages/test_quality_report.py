"""The tables of a chain: what each row is compared with, what follows for an export from its source, and how fast models are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from largeformer.artifact import Artifact
from largeformer.config.schema import Recipe
from largeformer.stages.quality_report import write_report
from tests.recipes import tiny_recipe

FIRST, LOSS, TOKENS, BYTES = 2.0, 2.1, 512, 1500
EXPORTED = math.exp(2.2)


def judged(loss: float, **others: Any) -> dict[str, Any]:
    """What the manifest of a stage says of a model that was compared with `pretrain`."""
    quality = {
        "parameters": 1000,
        "weight_bytes": 4000,
        "reference": "pretrain",
        "text": "p",
        "seq_length": 64,
        "tokens": TOKENS,
        "bytes": BYTES,
        "loss": loss,
        "reference_loss": FIRST,
        "kl": loss - FIRST,
        "top1_agreement": 0.9,
        "perplexity": math.exp(loss),
        "perplexity_increase": math.expm1(loss - FIRST),
        "bits_per_byte": 1.0,
        "latency": [{"shape": "1x1", "threads": 1, "tokens": 1, "model_ms": 3.0, "reference_ms": 4.0, "tokens_per_s": 1234.0}],
        "passed": True,
        **others,
    }
    return {"quality": quality}


def exported(tokens: int = TOKENS, **figures: Any) -> dict[str, Any]:
    parity = {"tokens": tokens, "perplexity": EXPORTED, "perplexity_increase": 0.001, "kl": 0.002, "top1_agreement": 0.99}
    return {"parameters": 1000, "formats": {"hf": {"bytes": {"model.safetensors": 4000}, "parity": {"model": parity}, **figures}}}


def report(folder: Path, export: dict[str, Any], parents: dict[str, str], seq_length: int = 64) -> dict[str, dict[str, Any]]:
    """The rows of a chain whose last stage has exported, by name."""
    Artifact("pretrain", folder / "pretrain", "t", {"prepare": "p"}, judged(FIRST)).write()
    Artifact("prune", folder / "prune", "r", {"prepare": "p", "pretrain": "t"}, judged(LOSS)).write()
    Artifact("quantize", folder / "quantize", "q", {"prepare": "p", "prune": "r"}, judged(LOSS)).write()
    made = Artifact("export", folder / "export", "e", parents, export).write()
    (made.path / "config.yaml").write_text(f"model: {{seq_length: {seq_length}}}\nexport: {{gate_tokens: 4096}}\n")
    write_report(recipe_in(folder))
    return {row["name"]: row for row in json.loads((folder / "quality.json").read_text())}


def recipe_in(folder: Path) -> Recipe:
    return tiny_recipe(run={"stages": ["prepare", "pretrain", "prune", "quantize", "export"], "output_dir": str(folder)})


OF_PRUNE = {"prepare": "p", "prune": "r"}
BESIDE: dict[str, tuple[dict[str, str], str]] = {
    "a stage of the chain": (OF_PRUNE, "prune"),
    "a model that is to be integers": ({"prepare": "p", "quantize": "q"}, "quantize, as floats"),
    "a model from elsewhere": ({"prepare": "p", "pretrain": "x"}, "pretrain x"),
}


@pytest.mark.parametrize(("parents", "name"), BESIDE.values(), ids=BESIDE)
def test_it_is_said_what_each_is_compared_with(tmp_path: Path, capsys: pytest.CaptureFixture[str], parents: Any, name: str) -> None:
    rows = report(tmp_path, exported(), parents)
    assert {row["beside"] for row in rows.values() if row["name"] != "export/hf"} == {"pretrain"}
    assert rows["export/hf"]["beside"] == name and rows["export/hf"]["perplexity_increase"] == 0.001
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("export/hf ")]
    assert name in line and "+0.10%" in line


# tokens, length of the windows, parents -> whether the export's figures may stand beside the chain's first model
TEXTS: dict[str, tuple[int, int, dict[str, str], bool]] = {
    "the same": (TOKENS, 64, OF_PRUNE, True),
    "more of it": (2 * TOKENS, 64, OF_PRUNE, False),
    "cut at other places": (TOKENS, 32, OF_PRUNE, False),
    "another run's": (TOKENS, 64, {"prepare": "other", "prune": "r"}, False),
    "a model that was not measured": (TOKENS, 64, {"prepare": "p", "prune": "x"}, False),
}


@pytest.mark.parametrize(("tokens", "seq_length", "parents", "same"), TEXTS.values(), ids=TEXTS)
def test_what_follows_for_an_export_over_the_same_text(
    tmp_path: Path, tokens: int, seq_length: int, parents: dict[str, str], same: bool
) -> None:
    row = report(tmp_path, exported(tokens), parents, seq_length)["export/hf"]
    assert row["increase_from_first"] == (pytest.approx(EXPORTED / math.exp(FIRST) - 1.0) if same else None)
    assert row["bits_per_byte"] == (pytest.approx(math.log2(EXPORTED) * TOKENS / BYTES) if same else None)


def test_the_zeros_of_an_export_are_told(tmp_path: Path) -> None:
    assert report(tmp_path, exported(sparsity={"model": {"zeros": 30, "weights": 40}}), OF_PRUNE)["export/hf"]["sparsity"] == 0.75
    assert report(tmp_path, exported(), OF_PRUNE)["export/hf"]["sparsity"] is None


def test_latency_is_told_beside_the_first_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = report(tmp_path, exported(), OF_PRUNE)["prune"]
    assert row["latency_ms"] == {"1x1, 1 thread": 3.0} and row["latency_ratio"] == {"1x1, 1 thread": 0.75}
    told = capsys.readouterr().out
    assert "latency in ms" in told and "3.00 x0.75" in told and "1,234" in told and "tokens/s" in told


def test_a_stage_that_failed_is_the_last_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though it has no manifest any more, and those behind it are an earlier run's."""
    report(tmp_path, exported(), OF_PRUNE)
    capsys.readouterr()
    (tmp_path / "prune" / "manifest.json").unlink()
    lost = judged(math.nan, perplexity=math.nan, perplexity_increase=math.nan, kl=math.nan, bits_per_byte=math.nan, passed=False)
    write_report(recipe_in(tmp_path), failed=Artifact("prune", tmp_path / "prune", "r", {}, lost))
    rows = json.loads((tmp_path / "quality.json").read_text(), parse_constant=pytest.fail)
    assert [(row["name"], row["passed"], row["perplexity"]) for row in rows] == [
        ("pretrain", True, pytest.approx(math.exp(FIRST))),
        ("prune", False, None),
    ]
    assert "FAIL" in capsys.readouterr().out
    assert (tmp_path / "quality.svg").read_text().count("<circle") == 1
