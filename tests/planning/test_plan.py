"""`largeformer plan` as its users meet it: tables, JSON, the search, the money, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from largeformer import cli
from largeformer.config.deepspeed import resolve_deepspeed
from largeformer.config.load import load_recipe
from largeformer.config.schema import Recipe
from largeformer.planning import search as search_module
from largeformer.planning.activations import backward_bytes
from largeformer.planning.advice import advice
from largeformer.planning.hardware import GIB, PRESETS, cluster_of
from largeformer.planning.money import Bill, bill, business_case
from largeformer.planning.plan import make
from largeformer.planning.prediction import Prediction, job_of, predict
from largeformer.planning.search import describe, search
from largeformer.planning.step import step_time

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ["-c", "llama-70b", "--gpu", "h100", "--world-size", "1024", "--tokens", "2e12", "--price-per-gpu-hour", "2.5"]


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = cli.main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_shown_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan(capsys, *SHOWN, "--search")
    assert code == 0 and found["fits"]
    rows = found["memory"]["per_rank"]
    assert [row["stage"] for row in rows] == list(range(8)) and sum(row["ranks"] for row in rows) == 1024
    for row in rows:
        parts = ("weights", "gradients", "master", "moments", "activation", "logits", "buffer", "allowance")
        assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in parts)
    assert len(found["search"]["best"]) == 5
    speeds = [best["step"]["seconds"] for best in found["search"]["best"]]
    assert speeds == sorted(speeds) and speeds[0] <= found["step"]["seconds"]
    assert found["training"]["days"] * 24 * 1024 == pytest.approx(found["training"]["gpu_hours"])
    assert found["training"]["gpu_cost"] == pytest.approx(2.5 * found["training"]["gpu_hours"])
    assert sum(found["search"]["why_not"].values()) > 1000


def test_a_searched_layout_is_one_that_a_run_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """What the search names goes into a recipe by its keys, resolves, and is planned alike."""
    _, found = plan(capsys, *SHOWN, "--search")
    for best in found["search"]["best"]:
        overrides = [f"{key}={json.dumps(value)}" for key, value in best["layout"].items()]
        code, again = plan(capsys, *SHOWN, *overrides)
        assert code == 0
        assert again["step"]["seconds"] == pytest.approx(best["step"]["seconds"], rel=1e-6)
        assert again["memory"]["per_rank"][0]["state_bytes"] == best["memory"]["per_rank"][0]["state_bytes"]


def test_search_finds_what_trying_everything_finds() -> None:
    """The fastest by simulation of all layouts that fit, and not only of those that a formula put first."""
    recipe = load_recipe("llama-8b", ["train.global_batch_size=64", "plan.gpu=h100"])
    cluster = cluster_of(recipe.plan)
    found = search(recipe, 16, cluster)
    everything = search_all(recipe, 16)
    assert found.best[0].step.seconds == pytest.approx(min(one.step.seconds for one in everything), rel=1e-9)


def test_search_offers_nothing_that_a_run_refuses() -> None:
    for one in search_all(load_recipe("llama-8b", ["train.global_batch_size=16"]), 8):
        resolve_deepspeed(one.job.recipe, one.job.deepspeed, 8)
        assert not one.misfits


def search_all(recipe: Recipe, world_size: int) -> list[Prediction]:
    with mock.patch.object(search_module, "_SIMULATED", 10**6), mock.patch.object(search_module, "BEST", 10**6):
        return search(recipe, world_size, cluster_of(recipe.plan)).best


def test_nothing_fits_says_what_is_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan(
        capsys, "-c", "llama-70b", "--gpu", "l40s", "--world-size", "8", "--search", "train.global_batch_size=8", "plan.host_gib_per_gpu=8"
    )
    assert code == 1 and found["search"]["best"] == []
    assert found["search"]["why_not"]["does not fit in memory"] > 0 and found["search"]["nearest"] is not None
    assert any("64 must divide it" in problem for problem in found["problems"])


def test_offload_is_searched_where_nothing_else_fits() -> None:
    recipe = load_recipe("llama-8b", ["train.global_batch_size=8"])
    found = search(recipe, 1, cluster_of(recipe.plan))
    assert found.best and all("offload" in describe(one.job)["deepspeed"] for one in found.best)
    assert all(one.memory[0].host_bytes > 0 for one in found.best)


@pytest.mark.parametrize("name", ["quickstart", "gpt2-125m", "llama-1b", "llama-8b"])
def test_shipped_recipes_fit_where_their_heads_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    worlds = {"quickstart": ("cpu", 1), "gpt2-125m": ("a100", 8), "llama-1b": ("h100", 8), "llama-8b": ("h100", 16)}
    gpu, world = worlds[name]
    code, found = plan(capsys, "-c", name, "--gpu", gpu, "--world-size", str(world))
    assert (code, found["fits"]) == (0, True), found["problems"]


def test_what_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = plan(capsys, "-c", "llama-8b", "--gpu", "l40s", "--world-size", "4", "deepspeed=zero1")
    assert code == 1 and not found["fits"]
    assert "l40s has 44.5" in found["problems"][0]
    assert cli.main(["plan", "-c", "llama-8b", "--gpu", "l40s", "--world-size", "4"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["exp[/1]", "[red]", "plain"])
def test_a_name_is_shown_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "-c", "quickstart", "--gpu", "cpu", f"run.name='{name}'"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")


BAD = {
    "unknown gpu": (["--gpu", "h1000"], "error: plan.gpu (--gpu) h1000 is not known; did you mean h100? there are a100, h100"),
    "world": (["--world-size", "24"], "error: train.global_batch_size 512 is not a multiple"),
    "world of no layout": (["--world-size", "3"], "error: world size 3 does not fit: parallel.tensor_model_parallel_size 2"),
    "no tokens": (["--tokens", "0"], "error: --tokens 0 is not a number of tokens to train on"),
    "endless tokens": (["--tokens", "inf"], "error: --tokens inf is not"),
    "tokens that are none": (["--tokens", "many"], "Invalid value for '--tokens'"),
    "negative price": (["--price-per-gpu-hour", "-1"], "Invalid value for '--price-per-gpu-hour'"),
    "business without a price": (["--business"], "error: --business needs a price"),
    "a key of the section": (["plan.gpus=8"], "plan.gpus"),
    "memory": (["plan.memory_gib=0"], "error: plan.memory_gib is 0"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_exits_with_2(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "-c", "llama-8b", *arguments]) == 2
    out, err = capfd.readouterr()
    assert message in err and out == ""


def test_all_that_is_wrong_is_told_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "-c", "llama-8b", "--tokens", "0", "--business"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("gpu", PRESETS)
def test_every_preset_is_planned_for(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = plan(capsys, "-c", "llama-1b", "--gpu", gpu.upper(), "--world-size", "8")
    assert 0 < found["step"]["mfu"] < 1 and found["gpu"]["name"] == gpu


def test_neither_torch_nor_data_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys; from largeformer.cli import main; code = main(sys.argv[1:]); "
        "print([name for name in ('torch', 'numpy', 'megatron', 'deepspeed') if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "plan", *SHOWN, "--business", "run.output_dir=" + str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert not (tmp_path / "none").exists()
    for word in ("70.6B parameters", "Memory", "Step", "MFU", "Training", "Business", "Advice"):
        assert word in done.stdout


def some_bill(**changes: float) -> Bill:
    recipe = load_recipe("llama-8b", ["plan.price_per_gpu_hour=2", "plan.price_per_kwh=0.1", "plan.power_usage_effectiveness=1.5"])
    return bill(recipe, recipe.plan, **{"world_size": 16, "tokens": 3.6e9, "tokens_per_s": 1e6, "watts": 700.0, **changes})  # type: ignore[arg-type]


def test_bill_by_hand() -> None:
    """3.6e9 tokens at a million a second are an hour, on 16 GPUs at 700 W and half as much for the building."""
    made = some_bill()
    assert (made.days * 24, made.gpu_hours, made.gpu_cost) == pytest.approx((1.0, 16.0, 32.0))
    assert made.energy_kwh == pytest.approx(16 * 0.7 * 1.5) and made.energy_cost == pytest.approx(1.68)
    assert made.checkpoint_gb == pytest.approx(8.030261248 * 14)
    assert made.storage_cost == pytest.approx(3 * made.checkpoint_gb * 0.023 / 24 / 30)
    assert made.steps == pytest.approx(3.6e9 / 512 / 8192)


STORED: dict[str, tuple[list[str], int, int]] = {
    "Adam, bf16": ([], 2 + 4 + 8, 3),
    "Adam, fp32": (["train.precision=fp32"], 4 + 8, 3),
    "SGD with momentum": (["optimizer.type=sgd", "optimizer.momentum=0.9"], 2 + 4 + 4, 3),
    "SGD without": (["optimizer.type=sgd", "optimizer.momentum=0"], 2 + 4, 3),
    "the best": (["checkpoint.keep_best=2", "checkpoint.save_interval=50", "train.eval_interval=50"], 14, 3 + 2),
    "every so many steps": (["checkpoint.keep_every=100", "checkpoint.save_interval=50"], 14, 3 + 10),
    "only those that are saved": (["checkpoint.keep_every=100", "checkpoint.save_interval=250"], 14, 3 + 2),
    "none is saved on the way": (["checkpoint.keep_every=100", "checkpoint.save_interval=null"], 14, 3),
}


@pytest.mark.parametrize(("overrides", "width", "kept"), STORED.values(), ids=STORED)
def test_what_is_stored_by_hand(overrides: list[str], width: int, kept: int) -> None:
    recipe = load_recipe("llama-8b", ["train.train_iters=1000", "optimizer.lr_warmup_iters=10", "plan.price_per_gpu_hour=2", *overrides])
    made = bill(recipe, recipe.plan, world_size=16, tokens=3.6e9, tokens_per_s=1e6, watts=700.0)
    assert made.checkpoint_gb == pytest.approx(8.030261248 * width)
    assert made.storage_cost == pytest.approx(kept * made.checkpoint_gb * recipe.plan.price_per_storage_gb_month / 24 / 30)
    assert business_case(recipe.plan, made).lines[2][1] == pytest.approx(kept * made.checkpoint_gb)


def business(**changes: float) -> Any:
    recipe = load_recipe(
        "llama-8b",
        [
            "plan.price_per_gpu_hour=2",
            "plan.price_per_storage_gb_month=0.05",
            "plan.price_per_traffic_gb=0.1",
            *(f"plan.business.{key}={value}" for key, value in changes.items()),
        ],
    )
    return business_case(recipe.plan, some_bill())


def test_business_case_by_hand() -> None:
    case = business(
        storage_gb=100,
        storage_months=6,
        traffic_gb=50,
        staff_hours=10,
        price_per_staff_hour=80,
        saved_gpu_hours_per_month=40,
        deployment_saving_per_month=20,
    )
    assert [line[-1] for line in case.lines] == pytest.approx([32.0, 0.0, 30.0, 5.0, 800.0])
    assert case.cost == pytest.approx(867.0)
    assert case.benefit_per_month == pytest.approx(100.0)
    assert case.net_benefit == pytest.approx(333.0) and case.roi == pytest.approx(333 / 867)
    assert case.payback_months == pytest.approx(8.67)


def test_no_benefit_is_never_paid_back(capsys: pytest.CaptureFixture[str]) -> None:
    case = business()
    assert (case.benefit_per_month, case.payback_months) == (0.0, None)
    assert case.roi == pytest.approx(-1.0)
    code, found = plan(capsys, *SHOWN, "--business")
    assert code == 0 and found["business"]["payback_months"] is None
    assert cli.main(["plan", *SHOWN, "--business"]) == 0
    assert "never paid back" in capsys.readouterr().out


def test_more_of_everything_costs_more() -> None:
    recipe = load_recipe("llama-70b", ["plan.gpu=h100"])
    cluster = cluster_of(recipe.plan)

    def seconds(*overrides: str, world: int = 128) -> float:
        changed = load_recipe("llama-70b", list(overrides))
        return step_time(job_of(changed, world, {"zero_optimization": {"stage": 1}}, cluster_of(changed.plan))).seconds

    plain = step_time(job_of(recipe, 128, {"zero_optimization": {"stage": 1}}, cluster)).seconds
    assert seconds("plan.network_gbit_per_s=50") > plain
    assert seconds("plan.link_gb_per_s=100") > plain
    assert seconds("train.recompute_granularity=full", "train.recompute_method=uniform", "train.recompute_num_layers=1") > 1.2 * plain
    assert seconds("parallel.virtual_pipeline_model_parallel_size=null") > plain
    assert seconds(world=1024) < plain


def test_a_step_is_the_sum_of_its_parts() -> None:
    step = make(load_recipe("llama-70b"), world_size=1024).prediction.step  # type: ignore[union-attr]
    parts = (step.work_s, step.tensor_s, step.bubble_s, step.data_s, step.optimizer_s)
    assert min(parts) > 0 and sum(parts) == pytest.approx(step.seconds)


def test_interleaving_holds_more_micro_batches() -> None:
    """On the first stage (1 + (p - 1) / (p v)) times the layers' activations (Korthikanti et al. 2022, section 4.2.3)."""

    def first_stage(virtual: str) -> int:
        recipe = load_recipe("llama-70b", [f"parallel.virtual_pipeline_model_parallel_size={virtual}"])
        planned = make(recipe, world_size=1024)
        assert planned.prediction is not None
        return planned.prediction.memory[0].activation_bytes - backward_bytes(recipe)

    for virtual in (2, 5, 10):
        assert first_stage(str(virtual)) / first_stage("null") == pytest.approx(1 + 7 / (8 * virtual), rel=0.01)


@pytest.mark.parametrize(
    ("ranks", "stride", "expected"),
    [
        pytest.param(8, 1, 450.0, id="a node"),
        pytest.param(2, 4, 450.0, id="half a node away"),
        pytest.param(16, 8, 50.0, id="one rank of each node: one share of the network"),
        pytest.param(64, 2, 200.0, id="four of each node"),
        pytest.param(64, 1, 400.0, id="all of them, not more than the link"),
    ],
)
def test_bandwidth_of_a_group(ranks: int, stride: int, expected: float) -> None:
    cluster = cluster_of(load_recipe("llama-8b", ["plan.gpu=h100"]).plan)
    assert cluster.group_gb_s(ranks, stride) == expected


def test_estimate_of_the_search_is_near_the_simulation() -> None:
    for overrides in ([], ["parallel.virtual_pipeline_model_parallel_size=null"], ["parallel.virtual_pipeline_model_parallel_size=5"]):
        recipe = load_recipe("llama-70b", overrides)
        job = job_of(recipe, 1024, {"zero_optimization": {"stage": 1}}, cluster_of(recipe.plan))
        assert step_time(job, exact=False).seconds == pytest.approx(step_time(job).seconds, rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "world", "overrides", "expected"),
    [
        pytest.param("gpt2-125m", 8, [], "Small scale", id="one device holds it"),
        pytest.param("llama-8b", 16, [], "Medium scale", id="a node holds it"),
        pytest.param("llama-70b", 128, [], "Large scale", id="several nodes hold it"),
        pytest.param(
            "llama-70b",
            8,
            ["parallel.pipeline_model_parallel_size=1", "parallel.virtual_pipeline_model_parallel_size=null"],
            "Too large",
            id="nothing holds it",
        ),
    ],
)
def test_advice_by_scale(recipe: str, world: int, overrides: list[str], expected: str) -> None:
    planned = make(load_recipe(recipe, overrides), world_size=world)
    assert planned.chosen is not None
    assert advice(planned.chosen)[0].startswith(expected)


def test_advice_names_what_fills_the_memory() -> None:
    activations = make(load_recipe("llama-8b", ["train.micro_batch_size=16", "train.recompute_granularity=null"]), world_size=16)
    assert activations.chosen is not None and not activations.fits
    told = " ".join(advice(activations.chosen))
    assert "lower train.micro_batch_size from 16" in told and "train.recompute_granularity=full" in told


def test_the_loads_of_a_stage_that_holds_less(capsys: pytest.CaptureFixture[str]) -> None:
    """Uneven stages: fewer layers, less state; the last holds the head instead."""
    _, found = plan(capsys, "-c", "llama-8b", "--world-size", "4", "parallel.num_layers_in_first_pipeline_stage=12")
    first, last = found["memory"]["per_rank"]
    assert first["parameters"] < last["parameters"]
    assert last["logits_bytes"] > 0 == first["logits_bytes"]


def test_memory_is_not_promised_to_the_last_byte() -> None:
    recipe = load_recipe("llama-8b", [])
    one = predict(job_of(recipe, 16, {"zero_optimization": {"stage": 1}}, cluster_of(recipe.plan)))
    assert one.fullest.allowance_bytes > 1 * GIB
    assert math.isfinite(one.step.seconds)
