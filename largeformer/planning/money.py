"""What a run takes in days, energy and money, and what it gives back.

Money has the unit of the recipe's prices.
"""

from __future__ import annotations

from dataclasses import dataclass

from largeformer.config.plan import PlanConfig
from largeformer.config.schema import Recipe
from largeformer.models.flops import parameter_count
from largeformer.planning.stored import checkpoint_bytes, kept_checkpoints

_GB = 1e9


@dataclass(frozen=True)
class Bill:
    """stored_gb: of all checkpoints that are kept. cost is None where no price of a GPU hour is given."""

    tokens: float
    steps: float
    days: float
    gpu_hours: float
    energy_kwh: float
    checkpoint_gb: float
    stored_gb: float
    gpu_cost: float | None
    energy_cost: float
    storage_cost: float

    @property
    def cost(self) -> float | None:
        return None if self.gpu_cost is None else self.gpu_cost + self.energy_cost + self.storage_cost


def bill(recipe: Recipe, plan: PlanConfig, *, world_size: int, tokens: float, tokens_per_s: float, watts: float) -> Bill:
    """Training on `tokens`: GPUs by the hour, power as much as `watts` a board with what the building adds, and the storage of the
    checkpoints that are kept, while it runs. A 30-day month."""
    seconds = tokens / tokens_per_s
    days = seconds / 86_400
    gpu_hours = seconds / 3600 * world_size
    energy = gpu_hours * watts / 1000 * plan.power_usage_effectiveness
    one = checkpoint_gb(recipe)
    stored = one * kept_checkpoints(recipe)
    return Bill(
        tokens=tokens,
        steps=tokens / (recipe.train.global_batch_size * recipe.model.seq_length),
        days=days,
        gpu_hours=gpu_hours,
        energy_kwh=energy,
        checkpoint_gb=one,
        stored_gb=stored,
        gpu_cost=None if plan.price_per_gpu_hour is None else gpu_hours * plan.price_per_gpu_hour,
        energy_cost=energy * plan.price_per_kwh,
        storage_cost=stored * plan.price_per_storage_gb_month * days / 30,
    )


def checkpoint_gb(recipe: Recipe) -> float:
    """Weights, float32 masters and moments of one checkpoint."""
    return parameter_count(recipe.model, recipe.tokenizer.vocab_size) * checkpoint_bytes(recipe) / _GB


@dataclass(frozen=True)
class BusinessCase:
    """lines: what is paid for, quantity, price of one, cost. roi: net benefit over the horizon, relative to the cost; payback_months:
    when benefits have paid the cost. Both None where they mean nothing: without costs, and payback also without benefits."""

    lines: tuple[tuple[str, float, str, float, float], ...]
    cost: float
    saved_training_per_month: float
    saved_deployment_per_month: float
    horizon_months: float
    net_benefit: float
    roi: float | None
    payback_months: float | None

    @property
    def benefit_per_month(self) -> float:
        return self.saved_training_per_month + self.saved_deployment_per_month


def business_case(plan: PlanConfig, made: Bill) -> BusinessCase:
    """Costs of the run and of keeping its result, against what it saves a month. Needs `plan.price_per_gpu_hour`."""
    assert plan.price_per_gpu_hour is not None, "the stage asks for it"
    given = plan.business
    stored = given.storage_gb if given.storage_gb is not None else made.stored_gb
    storage = plan.price_per_storage_gb_month * given.storage_months
    lines = tuple(
        (what, quantity, unit, price, quantity * price)
        for what, quantity, unit, price in (
            ("GPUs", made.gpu_hours, "GPU hours", plan.price_per_gpu_hour),
            ("energy", made.energy_kwh, "kWh", plan.price_per_kwh),
            ("storage", stored, f"GB for {given.storage_months:g} months", storage),
            ("traffic", given.traffic_gb, "GB", plan.price_per_traffic_gb),
            ("staff", given.staff_hours, "hours", given.price_per_staff_hour),
        )
    )
    cost = sum(line[-1] for line in lines)
    training = given.saved_gpu_hours_per_month * plan.price_per_gpu_hour
    benefit = training + given.deployment_saving_per_month
    net = benefit * given.horizon_months - cost
    return BusinessCase(
        lines=lines,
        cost=cost,
        saved_training_per_month=training,
        saved_deployment_per_month=given.deployment_saving_per_month,
        horizon_months=given.horizon_months,
        net_benefit=net,
        roi=net / cost if cost > 0 else None,
        payback_months=cost / benefit if benefit > 0 and cost > 0 else None,
    )
