"""A plan for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from largeformer.config.deepspeed import ZeroConfig
from largeformer.config.size import model_parameters
from largeformer.planning.advice import advice
from largeformer.planning.hardware import GIB
from largeformer.planning.memory import RankMemory
from largeformer.planning.money import Bill, BusinessCase
from largeformer.planning.plan import Plan
from largeformer.planning.prediction import Prediction
from largeformer.planning.search import deepspeed_name

_MOST_STAGES = 8  # a longer pipeline shows its first, second and last stages
_PARTS = (
    ("weights", "weights_bytes"),
    ("grads", "gradients_bytes"),
    ("masters", "master_bytes"),
    ("moments", "moments_bytes"),
    ("activ.", "activation_bytes"),
    ("logits", "logits_bytes"),
    ("buffers", "buffer_bytes"),
    ("other", "allowance_bytes"),
    ("start", "start_bytes"),
    ("total", "total_bytes"),
)


def show(plan: Plan) -> None:
    console = Console(highlight=False)
    gpu, recipe = plan.cluster.gpu, plan.recipe
    parameters = model_parameters(recipe.model, recipe.padded_vocab_size)
    peak = plan.cluster.peak_flops(recipe.train.precision) / 1e12
    console.print(
        f"[bold]{escape(recipe.run.name)}[/]: {_count(parameters)} parameters, {recipe.train.precision}, on {plan.world_size:,} x "
        f"{gpu.name} ({gpu.memory_gib:g} GiB, {peak:,.4g} TFLOP/s; links {gpu.link_gb_s:g} GB/s in "
        f"nodes of {plan.cluster.gpus_per_node}, {gpu.network_gbit_s:g} Gbit/s between)"
    )
    for problem in plan.problems:
        console.print(Text(f"The recipe's own layout: {problem}", style="yellow"))
    if plan.prediction:
        _prediction(console, plan.prediction)
    if plan.found:
        _search(console, plan)
    if plan.bill:
        _bill(console, plan.bill, plan.found is not None and bool(plan.found.best))
    if plan.business:
        _business(console, plan.business)
    if plan.chosen:
        console.print("\n[bold]Advice[/]" + (" on the best layout" if plan.found and plan.found.best else ""))
        for sentence in advice(plan.chosen):
            console.print(Text(f"- {sentence}"))


def _prediction(console: Console, one: Prediction) -> None:
    job, step = one.job, one.step
    layout = job.layout
    console.print(
        f"\n[bold]Layout[/] tensor {layout.tensor}{' + sequence' if layout.sequence_parallel else ''} x pipeline {layout.pipeline}"
        f"{f' ({layout.virtual} virtual stages)' if layout.virtual > 1 else ''} x data {layout.data}, "
        f"{deepspeed_name(ZeroConfig.of(job.deepspeed))}, {job.microbatches} micro batches of {job.recipe.train.micro_batch_size}"
    )
    table = Table("stage", *(name for name, _ in _PARTS), box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in _shown(one.memory):
        cells = [_gib(getattr(row, attribute)) for _, attribute in _PARTS]
        table.add_row(str(row.stage), *cells)
    console.print(f"[bold]Memory[/] in GiB on each rank of a stage ({one.memory[0].ranks:,} alike)")
    console.print(table)
    if len(one.memory) > _MOST_STAGES:
        console.print(f"and {len(one.memory) - 3} stages between", style="dim")
    host, nvme = max(row.host_bytes for row in one.memory), max(row.nvme_bytes for row in one.memory)
    if host or nvme:
        console.print(f"beside the GPU, a rank: {_gib(host)} GiB on the host, {_gib(nvme)} GiB on NVMe")
    if one.misfits:
        for sentence in one.misfits:
            console.print(Text(f"DOES NOT FIT: {sentence}", style="bold red"))
    else:
        used = one.fullest.total_bytes / GIB / job.cluster.gpu.memory_gib
        console.print(f"[green]fits[/]: {used:.0%} of the memory")
    parts = (
        ("work", step.work_s),
        ("tensor communication", step.tensor_s),
        ("bubble", step.bubble_s),
        ("data-parallel exchange", step.data_s),
        ("optimizer", step.optimizer_s),
    )
    console.print(
        f"[bold]Step[/] {_seconds(step.seconds)}: "
        + ", ".join(f"{name} {seconds / step.seconds:.0%}" for name, seconds in parts if seconds > 0.005 * step.seconds)
    )
    console.print(f"{step.tokens_per_s:,.0f} tokens/s, MFU {step.mfu:.1%}")


def _search(console: Console, plan: Plan) -> None:
    found = plan.found
    assert found is not None
    console.print(f"\n[bold]Search[/] through {found.tried:,} layouts")
    if found.best:
        _best(console, found.best)
    else:
        console.print(Text("No layout fits.", style="bold red"))
        if found.nearest:
            console.print(Text(f"The one that needs least {found.nearest.misfits[0]}:"))
            _best(console, [found.nearest])
    for reason, count in found.why_not.most_common():
        console.print(f"  {count:,} more: {reason}", style="dim")


def _best(console: Console, best: Sequence[Prediction]) -> None:
    headers = ("", "TP", "PP", "VP", "DP", "ZeRO", "MB", "recompute", "GiB", "step", "tokens/s", "MFU", "bubble")
    table = Table(*headers, box=None, header_style="bold", pad_edge=False)
    for number, one in enumerate(best, start=1):
        job, step, train = one.job, one.step, one.job.recipe.train
        selective = train.recompute_granularity == "selective"
        recompute = " + ".join(train.recompute_modules) if selective else train.recompute_granularity or "none"
        cells = (
            number,
            job.layout.tensor,
            job.layout.pipeline,
            job.layout.virtual,
            job.layout.data,
            deepspeed_name(ZeroConfig.of(job.deepspeed)).removeprefix("zero").replace("_offload_", "+"),
            train.micro_batch_size,
            recompute,
            f"{one.fullest.total_bytes / GIB:.1f}",
            _seconds(step.seconds),
            f"{step.tokens_per_s:,.0f}",
            f"{step.mfu:.1%}",
            f"{step.bubble:.1%}",
        )
        table.add_row(*map(str, cells))
    for column in (*table.columns[1:7], *table.columns[8:]):
        column.justify = "right"
    console.print(table)


def _bill(console: Console, bill: Bill, best: bool) -> None:
    console.print(
        f"\n[bold]Training[/]{' with the best of them' if best else ''} on {_count(bill.tokens)} tokens: {bill.steps:,.0f} steps, "
        f"{_days(bill.days)}, {bill.gpu_hours:,.0f} GPU hours, {bill.energy_kwh / 1000:,.1f} MWh"
    )
    cost = "no price given (--price-per-gpu-hour)" if bill.cost is None else f"costs {bill.cost:,.0f}"
    console.print(f"{cost}; a checkpoint takes {bill.checkpoint_gb:,.0f} GB")


def _business(console: Console, case: BusinessCase) -> None:
    table = Table("costs", "quantity", "", "price", "cost", box=None, header_style="bold", pad_edge=False)
    for name, quantity, unit, price, cost in case.lines:
        table.add_row(name, f"{quantity:,.0f}", unit, f"{price:,.4g}", f"{cost:,.0f}")
    table.add_row("[bold]in all[/]", "", "", "", f"[bold]{case.cost:,.0f}[/]")
    table.add_row("benefit a month", "", "saved training", "", f"{case.saved_training_per_month:,.0f}")
    table.add_row("", "", "deployment", "", f"{case.saved_deployment_per_month:,.0f}")
    for column in (table.columns[1], table.columns[3], table.columns[4]):
        column.justify = "right"
    console.print("\n[bold]Business[/]")
    console.print(table)
    roi = "no return on investment: nothing is spent" if case.roi is None else f"return on investment {case.roi:.0%}"
    console.print(f"over {case.horizon_months:g} months: net {case.net_benefit:,.0f}, {roi}")
    if case.payback_months is not None:
        console.print(f"paid back after {case.payback_months:,.1f} months")
    elif case.cost > 0:
        console.print("never paid back: no benefit is given (plan.business.saved_gpu_hours_per_month, deployment_saving_per_month)")


def _shown(rows: list[RankMemory]) -> list[RankMemory]:
    return rows if len(rows) <= _MOST_STAGES else [*rows[:2], rows[-1]]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.2g} hours"


def _count(number: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:,.0f}"
