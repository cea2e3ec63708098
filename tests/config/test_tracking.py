"""Rules of the section `tracking`."""

from __future__ import annotations

from typing import Any

import pytest

from largeformer.config.checks import recipe_problems
from tests.recipes import tiny_recipe

REAL: dict[str, Any] = {"data": {"sources": [{"path": "python-docs"}]}}
PROMPTS: dict[str, Any] = {**REAL, "tracking": {"sample_prompts": ["def "]}}
CASES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no prompts": ({**REAL, "parallel": {"pipeline_model_parallel_size": 2}}, None),
    "tensor parallel": ({**PROMPTS, "parallel": {"tensor_model_parallel_size": 2}}, None),
    "pipeline": ({**PROMPTS, "parallel": {"pipeline_model_parallel_size": 2}}, "parallel.pipeline_model_parallel_size 2"),
    "sequence parallel": (
        {**PROMPTS, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        "parallel.sequence_parallel true",
    ),
    "compiled": ({**PROMPTS, "train": {"compile": True}}, "train.compile true"),
    "random tokens": ({"tracking": {"sample_prompts": ["def "]}}, "data.sources mock"),
}


@pytest.mark.parametrize(("sections", "obstacle"), CASES.values(), ids=CASES)
def test_where_samples_cannot_be_drawn_the_recipe_says_so(sections: dict[str, Any], obstacle: str | None) -> None:
    problems = recipe_problems(tiny_recipe(**sections))
    assert [obstacle in problem for problem in problems if obstacle] == ([True] if obstacle else [])
    assert bool(problems) == (obstacle is not None)
