"""The benchmarks that take hours, on a teacher of a few steps: each runs to its end, and what has failed is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.test_end_to_end import ROOT, start
from tests.stages.test_prune import write_recipe

pytestmark = pytest.mark.slow
SHORT = ["distill.train={train_iters: 2, eval_interval: 2}", "distill.optimizer={lr_warmup_iters: 0}", "quality={tokens: 256, rounds: 1}"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a recipe whose later stages, schedule and limits suit no benchmark."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("benchmarks"),
        model={"num_layers": 6},
        run={"stages": ["prepare", "pretrain", "prune", "distill", "quantize"]},
        optimizer={"lr_decay_style": "WSD", "lr_wsd_decay_iters": 1},
        prune={"target_parameters": 0.85},
        distill={"teacher": "pretrain", "alpha": 0.5},
        quantize={"scheme": "w8a16"},
        quality={"limits": {"distill": {"max_perplexity_increase": 0.0}}},
    )
    assert start("pretrain", "-c", str(recipe)).returncode == 0
    return recipe.parent / "run"


def benchmark(name: str, *arguments: str) -> tuple[int, list[list[str]]]:
    """The exit code, and the cells of the table."""
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *arguments, *SHORT]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("| ")]


def test_students(teacher: Path, tmp_path: Path) -> None:
    code, (_, *rows) = benchmark("distillation", str(teacher), "--keep", str(tmp_path / "students"), "--seeds", "1")
    assert code == 0
    found = {tuple(row[:2]): float(row[2]) for row in rows}
    assert len(found) == len(set(found.values())) == 4
    assert [row[3] for row in rows] == [row[2] for row in rows]


def test_branches(teacher: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "magnitude-50" / "prune" / "manifest.json"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("{")
    code, (_, *rows) = benchmark("pruning", str(teacher), "--keep", str(tmp_path))
    assert code == 2, "one has failed, the others have not"
    models = [tuple(row[:2]) for row in rows]
    assert models.count(("magnitude-50", "prune")) == 0
    expected = {"wanda-50": 3, "sparsegpt-50": 2, "width-85": 3, "ffn-85": 3, "depth-5": 4, "width-as-depth-5": 3, "ffn-as-depth-5": 3}
    for branch, stages in expected.items():
        assert sum(name == branch for name, _ in models) == stages, branch
    zeros = {tuple(row[:2]): row[7] for row in rows}
    assert zeros["wanda-50", "prune"] == zeros["wanda-50", "distill"] == "50%"
    in_the_way.unlink()
    code, (_, *again) = benchmark("pruning", str(teacher), "--keep", str(tmp_path), "--only", "magnitude")
    assert code == 0 and again[1][:2] == ["magnitude-50", "prune"]
