"""`largeformer plan`: memory, time and money of a recipe on a cluster. Opens no data, and asks nothing of this machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from largeformer.config.schema import Recipe
from largeformer.planning.advice import advice
from largeformer.planning.hardware import GIB, Cluster
from largeformer.planning.money import BusinessCase
from largeformer.planning.plan import Plan, make
from largeformer.planning.prediction import Prediction
from largeformer.planning.search import Found, describe
from largeformer.stages.plan_tables import show

FITS, DOES_NOT_FIT = 0, 1


def run(
    recipe: Recipe,
    *,
    world_size: int | None = None,
    tokens: float | None = None,
    search_layouts: bool = False,
    business: bool = False,
    as_json: bool = False,
) -> int:
    """Print the plan. Returns the exit code: 0 where it fits, 1 where it does not. Raises BadInputError for what makes no sense."""
    plan = make(recipe, world_size=world_size, tokens=tokens, search_layouts=search_layouts, business=business)
    if as_json:
        print(json.dumps(as_object(plan), indent=2, allow_nan=False))
    else:
        show(plan)
    return FITS if plan.fits else DOES_NOT_FIT


def as_object(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON object. Bytes, seconds, and money in the unit of the prices."""
    chosen, found = plan.chosen, plan.found
    return {
        "recipe": plan.recipe.run.name,
        "gpu": asdict(plan.cluster.gpu),
        "world_size": plan.world_size,
        "fits": plan.fits,
        "problems": [*plan.problems, *(plan.prediction.misfits if plan.prediction else [])],
        "layout": {**describe(plan.prediction.job), "deepspeed": plan.recipe.deepspeed} if plan.prediction else None,
        "memory": _memory(plan.prediction, plan.cluster) if plan.prediction else None,
        "step": asdict(plan.prediction.step) if plan.prediction else None,
        "training": None if plan.bill is None else {**asdict(plan.bill), "cost": plan.bill.cost},
        "advice": advice(chosen) if chosen else [],
        "search": _search(found, plan.cluster) if found else None,
        "business": _business(plan.business) if plan.business else None,
    }


def _memory(prediction: Prediction, cluster: Cluster) -> dict[str, Any]:
    rows = [
        {**asdict(row), "state_bytes": row.state_bytes, "allocated_bytes": row.allocated_bytes, "total_bytes": row.total_bytes}
        for row in prediction.memory
    ]
    return {"capacity_bytes": round(cluster.gpu.memory_gib * GIB), "per_rank": rows}


def _search(found: Found, cluster: Cluster) -> dict[str, Any]:
    def entry(one: Prediction) -> dict[str, Any]:
        return {"layout": describe(one.job), "memory": _memory(one, cluster), "step": asdict(one.step)}

    return {
        "tried": found.tried,
        "best": [entry(one) for one in found.best],
        "why_not": dict(found.why_not.most_common()),
        "nearest": entry(found.nearest) if found.nearest else None,
    }


def _business(case: BusinessCase) -> dict[str, Any]:
    lines = [dict(zip(("what", "quantity", "unit", "price", "cost"), line, strict=True)) for line in case.lines]
    return {**asdict(case), "lines": lines, "benefit_per_month": case.benefit_per_month}
