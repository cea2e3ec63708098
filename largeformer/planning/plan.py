"""A plan: what a recipe needs on a cluster, what it takes, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from largeformer.config.deepspeed import ZeroConfig, load_deepspeed, resolve_deepspeed
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.planning.hardware import Cluster, cluster_of
from largeformer.planning.money import Bill, BusinessCase, bill, business_case
from largeformer.planning.prediction import Prediction, job_of, predict
from largeformer.planning.search import Found, search


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


def make(
    recipe: Recipe, *, world_size: int | None = None, tokens: float | None = None, search_layouts: bool = False, business: bool = False
) -> Plan:
    """The plan of `recipe` on `world_size` ranks, for `tokens` tokens; by default as many as its own steps train on.

    Raises BadInputError for what makes no sense, and for a layout that does not fit the ranks where none is searched for.
    """
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
    case = business_case(recipe.plan, made) if business and made else None
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
