"""The dry run's text: the recipe reads back, the table names who holds what, the DeepSpeed part is the dict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from largeformer.config.deepspeed import load_deepspeed, resolve_deepspeed
from largeformer.config.dry_run import dry_run_report, rank_table
from largeformer.config.load import load_recipe

TABLES = {
    "data": (
        [],
        2,
        """\
rank  data  pipeline  tensor  holds
   0     0         0       0  embedding + layers 0-3 + head
   1     1         0       0  embedding + layers 0-3 + head""",
    ),
    "tensor, data and pipeline": (
        ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        8,
        """\
rank  data  pipeline  tensor  holds
   0     0         0       0  embedding + layers 0-1
   1     0         0       1  embedding + layers 0-1
   2     1         0       0  embedding + layers 0-1
   3     1         0       1  embedding + layers 0-1
   4     0         1       0  layers 2-3 + head
   5     0         1       1  layers 2-3 + head
   6     1         1       0  layers 2-3 + head
   7     1         1       1  layers 2-3 + head""",
    ),
    "virtual stages": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        2,
        """\
rank  data  pipeline  tensor  holds
   0     0         0       0  embedding + layers 0, 2
   1     0         1       0  layers 1, 3 + head""",
    ),
    "uneven": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.num_layers_in_last_pipeline_stage=1"],
        2,
        """\
rank  data  pipeline  tensor  holds
   0     0         0       0  embedding + layers 0-2
   1     0         1       0  layer 3 + head""",
    ),
}


@pytest.mark.parametrize(("overrides", "world_size", "table"), TABLES.values(), ids=TABLES)
def test_table(overrides: list[str], world_size: int, table: str) -> None:
    recipe = load_recipe("quickstart", overrides)
    assert "\n".join(rank_table(recipe, recipe.layout(world_size))) == table


def test_a_large_world_is_shortened() -> None:
    recipe = load_recipe("llama-70b")
    lines = list(rank_table(recipe, recipe.layout(128)))
    assert len(lines) == 1 + 10 + 1 + 4
    assert lines[11] == "... 114 more ranks"
    assert lines[10].split()[0] == "9" and lines[12].split()[0] == "124"
    assert lines[-1] == " 127     1         7       7  layers 35-39, 75-79 + head"


def test_report_holds_all_three(tmp_path: Path) -> None:
    recipe = load_recipe("llama-8b")
    resolved = resolve_deepspeed(recipe, load_deepspeed(recipe), 16)
    report = dry_run_report(recipe, resolved, 16)
    yaml_part, _, rest = report.removeprefix("# Recipe\n").partition("# Layout")
    (tmp_path / "again.yaml").write_text(yaml_part)
    assert load_recipe(str(tmp_path / "again.yaml")) == recipe
    assert rest.startswith(": world size 16 = tensor 2 + sequence x pipeline 2 x data 4; 128 micro batches of 1 a step\n# 8,030,261,248 ")
    assert json.loads(rest.partition("# DeepSpeed\n")[2]) == resolved
