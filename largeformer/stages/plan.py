"""`largeformer plan`: memory, time and money of a recipe on a cluster. Opens no data, and asks nothing of this machine."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from largeformer.config.deepspeed import ZeroConfig, load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.planning.advice import advice
from largeformer.planning.hardware import GIB, Cluster, cluster_of
from largeformer.planning.money import Bill, BusinessCase, bill, business_case
from largeformer.planning.prediction import Prediction, job_of, predict
from largeformer.planning.search import Found, describe, search

FITS, DOES_NOT_FIT = 0, 1


@dataclass(frozen=True)
class Plan:
    """What was asked and what came out. prediction is None where the recipe's own layout is not possible on so many ranks, which
    `problems` then tells; that ends a plan, unless layouts are searched for."""

    recipe: Recipe
    cluster: Cluster
    world_size: int
    tokens: float
    prediction: Prediction | None
    problems: list[str]
    found: Found | None
    bill: Bill | None
    business: BusinessCase | None

    @property
    def chosen(self) -> Prediction | None:
        """What days and money are told of: the best layout found, else the recipe's own."""
        return self.found.best[0] if self.found and self.found.best else self.prediction

    @property
    def fits(self) -> bool:
        return self.chosen is not None and not self.chosen.misfits


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
        from largeformer.stages.plan_tables import show

        show(plan)
    return FITS if plan.fits else DOES_NOT_FIT


def make(
    recipe: Recipe, *, world_size: int | None = None, tokens: float | None = None, search_layouts: bool = False, business: bool = False
) -> Plan:
    """The plan itself; see `run`."""
    cluster = cluster_of(recipe.plan)
    world = world_size or recipe.parallel.tensor_model_parallel_size * recipe.parallel.pipeline_model_parallel_size
    amount = tokens if tokens is not None else float(recipe.train.train_iters * recipe.train.global_batch_size * recipe.model.seq_length)
    _check(recipe, amount, business)
    raw = load_deepspeed(recipe)
    prediction, problems = None, []
    try:
        prediction = predict(job_of(recipe, world, resolve_deepspeed(recipe, raw, world), cluster))
    except BadInputError as error:
        if not search_layouts:
            raise
        problems = error.problems
    found = search(recipe, world, cluster, ZeroConfig.of(raw).overlap_comm) if search_layouts else None
    chosen = found.best[0] if found and found.best else prediction
    made = _bill(recipe, world, amount, chosen, cluster) if chosen else None
    case = business_case(recipe.plan, made, recipe.checkpoint.keep_last) if business and made else None
    return Plan(recipe, cluster, world, amount, prediction, problems, found, made, case)


def _check(recipe: Recipe, tokens: float, business: bool) -> None:
    problems = []
    if not (math.isfinite(tokens) and tokens >= 1):
        problems.append(f"--tokens {tokens:g} is not a number of tokens to train on: give 1 or more, such as 2e12")
    if business and recipe.plan.price_per_gpu_hour is None:
        problems.append("--business needs a price: add --price-per-gpu-hour MONEY, or plan.price_per_gpu_hour")
    if problems:
        raise BadInputError(problems)


def _bill(recipe: Recipe, world_size: int, tokens: float, chosen: Prediction, cluster: Cluster) -> Bill:
    return bill(
        recipe,
        recipe.plan,
        world_size=world_size,
        tokens=tokens,
        tokens_per_s=chosen.step.tokens_per_s,
        watts=cluster.gpu.watts,
    )


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
