"""One step of distillation at any layout is that of one process, which is autograd's over both models' logits and hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from largeformer.config.schema import Recipe
from largeformer.models.gpt import build_gpt
from largeformer.parallel.device import prepare_device
from largeformer.parallel.groups import create_groups, destroy_groups
from tests.compression.distillation.courses import PAIRS, course_on, perturb, teacher_of
from tests.distributed import RankContext, RankPool
from tests.recipes import GPT2
from tests.training.engines import PP2, TP2, TP2_SP, Tensors, assert_same, fp16_on_cpu, global_batch, sgd_recipe

ONE: dict[str, Any] = {"parallel": {}}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
HIDDEN = {"hidden": {"weight": 2.0, "layers": PAIRS}}
# name: ranks, sections of the recipe
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel": TP2}),
    "tp2 + sp": (2, {"parallel": TP2_SP}),
    "pp2": (2, {"parallel": PP2}),
    "interleaved": (2, {"parallel": INTERLEAVED}),
    "dp2, zero 1": (2, {"deepspeed": "ds_configs/zero1.json"}),
    "dp2, zero 2": (2, {"deepspeed": "ds_configs/zero2.json"}),
    "dp2, zero 3": (2, {"deepspeed": "ds_configs/zero3.json"}),
    "tp2 + sp x pp2": (4, {"parallel": {**TP2_SP, **PP2}}),
}


def recipe_at(layout: str, **sections: Any) -> Recipe:
    _, own = LAYOUTS[layout]
    merged = {**sections, **own}
    if layout == "interleaved":  # two layers a stage
        merged["model"] = {**merged.get("model", {}), "num_layers": 4}
    merged["model"] = {"num_layers": 2, "init_method_std": 0.1, **merged.get("model", {})}
    return sgd_recipe(**merged)


def one_step(ranks: RankContext, recipe: Recipe, teacher: Recipe) -> tuple[float, dict[str, float], float | None, Tensors]:
    with course_on(ranks, recipe, teacher) as course:
        engine = course.bench.engine
        accumulated = engine.accumulate(course.begin(global_batch(recipe)))
        gradients = course.bench.gradients()
        result = engine.step(accumulated, 0.1)
        return result.loss, course.figures.means(), result.grad_norm, gradients


def by_autograd(ranks: RankContext, recipe: Recipe, teacher: Recipe) -> tuple[float, dict[str, float], Tensors]:
    """Loss, its parts and gradients, from whole logits and no code of ours but the models'."""
    device, groups = prepare_device(0), create_groups(recipe.layout(1))
    (own,), shards = build_gpt(recipe, groups, device)
    (theirs,), their_shards = build_gpt(teacher, groups, device)
    perturb(their_shards)
    states: dict[str, list[torch.Tensor]] = {"own": [], "theirs": []}
    for name, model, side in (("own", own, 0), ("theirs", theirs, 1)):
        for pair in PAIRS:
            model.decoder.layers[pair[side]].register_forward_hook(lambda *call, kept=states[name]: kept.append(call[2][0]))
    batch, settings, v = global_batch(recipe), recipe.distill, recipe.tokenizer.vocab_size
    inputs = batch.tokens, batch.position_ids, batch.attention_mask()
    logits = own(*inputs)[..., :v]
    with torch.no_grad():
        their_logits = theirs(*inputs)[..., :v]
    t, counted = settings.temperature, batch.loss_mask
    kd = t * t * F.kl_div((logits / t).log_softmax(-1), (their_logits / t).log_softmax(-1), reduction="none", log_target=True).sum(-1)
    ce = F.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none")
    parts = {"kd_loss": (kd * counted).sum() / counted.sum(), "ce_loss": (ce * counted).sum() / counted.sum()}
    loss = settings.alpha * parts["kd_loss"] + (1 - settings.alpha) * parts["ce_loss"]
    total = loss
    if settings.hidden is not None:
        widths = recipe.model.hidden_size, teacher.model.hidden_size
        distances = []
        for (number, _), x, y in zip(PAIRS, states["own"], states["theirs"], strict=True):
            if widths[0] != widths[1]:
                from largeformer.models.initialization import generator_for

                generator = generator_for(recipe.run.seed, f"distillation.projections.{number}.weight", device)
                x = x @ torch.empty(widths[::-1]).normal_(0.0, widths[0] ** -0.5, generator=generator).t()
            far = 1 - F.cosine_similarity(x, y, dim=-1) if settings.hidden.loss == "cosine" else (x - y).square().mean(-1)
            distances.append((far.t() * counted).sum() / counted.sum())
        parts["hidden_loss"] = settings.hidden.weight * torch.stack(distances).mean()
        total = total + parts["hidden_loss"]
    total.backward()
    gradients = {shard.key: shard.of(shard.parameter.grad).clone() for shard in shards}
    destroy_groups()
    return loss.item(), {name: value.item() for name, value in parts.items()}, gradients


def check(one: tuple[Any, ...], other: tuple[Any, ...], tolerance: float) -> None:
    loss, parts, norm, gradients = one
    other_loss, other_parts, other_norm, other_gradients = other
    assert loss == pytest.approx(other_loss, rel=tolerance)
    assert parts == pytest.approx(other_parts, rel=tolerance)
    assert norm == pytest.approx(other_norm, rel=10 * tolerance)
    assert_same(gradients, other_gradients, 10 * tolerance)


@pytest.mark.parametrize(
    ("settings", "wider"),
    [
        pytest.param({}, 96, id="logits"),
        pytest.param(HIDDEN, 64, id="hidden states, cosine"),
        pytest.param({"hidden": {**HIDDEN["hidden"], "loss": "mse"}}, 96, id="hidden states, projected, mse"),
    ],
)
def test_a_step_is_the_formulas(settings: dict[str, Any], wider: int, ranks: Callable[[int], RankPool]) -> None:
    recipe = recipe_at("one", distill=settings)
    teacher = teacher_of(recipe, hidden_size=wider)
    loss, parts, gradients = ranks(1).run(by_autograd, recipe, teacher)[0]
    our_loss, our_parts, _, found = ranks(1).run(one_step, recipe, teacher)[0]
    assert our_loss == pytest.approx(loss, rel=1e-5)
    assert our_loss == pytest.approx(0.7 * our_parts["kd_loss"] + 0.3 * our_parts["ce_loss"], rel=1e-6)
    assert our_parts == pytest.approx(parts, rel=1e-5)
    projections = {name: found.pop(name) for name in list(found) if name.startswith("distillation")}
    assert len(projections) == (len(PAIRS) if settings and wider != 64 else 0)
    assert all(projection.norm() > 1e-4 for projection in projections.values()), "a projection learns"
    assert_same(found, gradients, 1e-5)


SPREAD = [name for name in LAYOUTS if name not in ("one", "interleaved")]
# GPT-2's tied embedding, biases and learned positions, at the layout where most can go wrong; the others are slow in number
GPT2_TOO = [pytest.param(name, "gpt2", marks=() if name == "tp2 + sp x pp2" else pytest.mark.slow) for name in SPREAD]


@pytest.mark.parametrize(("layout", "kind"), [*((name, "llama") for name in SPREAD), *GPT2_TOO])
def test_a_step_at_any_layout_is_that_of_one_process(layout: str, kind: str, ranks: Callable[[int], RankPool]) -> None:
    sections: dict[str, Any] = {"distill": HIDDEN, "model": GPT2 if kind == "gpt2" else {}}
    world, _ = LAYOUTS[layout]
    alone, spread = recipe_at("one", **sections), recipe_at(layout, **sections)
    found = ranks(world).run(one_step, spread, teacher_of(spread))
    expected = ranks(1).run(one_step, alone, teacher_of(alone))[0]
    check(found[0], expected, 1e-5)
    assert all(other[:3] == found[0][:3] for other in found), "alike on every rank"


def test_an_interleaved_pipeline(ranks: Callable[[int], RankPool]) -> None:
    spread = recipe_at("interleaved", distill={"divergence": "js"})
    alone = spread.model_copy(update={"parallel": type(spread.parallel)()})
    check(ranks(2).run(one_step, spread, teacher_of(spread))[0], ranks(1).run(one_step, alone, teacher_of(alone))[0], 1e-5)


def in_half(ranks: RankContext, recipe: Recipe, teacher: Recipe) -> tuple[float, dict[str, float], float | None, Tensors]:
    with fp16_on_cpu():
        return one_step(ranks, recipe, teacher)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_fp32(precision: str, ranks: Callable[[int], RankPool]) -> None:
    sections: dict[str, Any] = {"distill": HIDDEN, "deepspeed": "ds_configs/zero1.json"}
    exact = recipe_at("one", **sections)
    half = exact.model_copy(update={"train": exact.train.model_copy(update={"precision": precision, "initial_loss_scale_power": 8})})
    loss, parts, norm, _ = ranks(1).run(in_half, half, teacher_of(half))[0]
    exact_loss, exact_parts, exact_norm, _ = ranks(1).run(one_step, exact, teacher_of(exact))[0]
    assert loss == pytest.approx(exact_loss, rel=0.02)
    assert parts == pytest.approx(exact_parts, rel=0.02)
    assert norm == pytest.approx(exact_norm, rel=0.05)


def learning(ranks: RankContext, recipe: Recipe, teacher: Recipe) -> list[dict[str, float]]:
    """The parts of the loss over 12 steps on one batch."""
    with course_on(ranks, recipe, teacher) as course:
        found = []
        for _ in range(12):
            course.step(global_batch(recipe), 3.0e-3)
            found.append(course.figures.means())
    return found


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        pytest.param({"alpha": 1.0}, "kd_loss", id="forward KL"),
        pytest.param({"alpha": 1.0, "divergence": "reverse_kl"}, "kd_loss", id="reverse KL"),
        pytest.param({"alpha": 1.0, "divergence": "js"}, "kd_loss", id="Jensen-Shannon"),
        pytest.param(HIDDEN, "hidden_loss", id="hidden states"),
    ],
)
def test_the_student_comes_to_say_what_the_teacher_says(settings: dict[str, Any], part: str, ranks: Callable[[int], RankPool]) -> None:
    """Each part by itself: the labels are random, and pull elsewhere."""
    optimizer = {"type": "adamw", "lr": 3.0e-3, "weight_decay": 0.0, "clip_grad": 1.0}
    recipe = recipe_at("one", distill=settings, optimizer=optimizer)
    found = ranks(1).run(learning, recipe, teacher_of(recipe))[0]
    assert found[-1][part] < 0.9 * found[0][part], [row[part] for row in found]
