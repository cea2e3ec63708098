"""What makes it fast on a GPU: flash attention, compiled layers, a loss without whole logits. And that text comes out.

`n` tokens, `h` hidden, `v` vocabulary.
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from largeformer.config.schema import GenerateConfig, Recipe
from largeformer.evaluation.generation import generate, inference_recipe
from largeformer.models.losses import HeadLoss
from largeformer.parallel.groups import ParallelGroups, create_groups, destroy_groups
from tests.gpu.runs import assert_alike, engine_on, recipe_of, step, trained

pytestmark = pytest.mark.gpu

EOD = 2


def test_attention_runs_in_the_flash_kernel(device: torch.device) -> None:
    """Forward and backward with every other kernel forbidden, grouped queries and all. In fp32, which CUDA's flash kernel does not
    know, the same must fail: so the ban is effective."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        restricted = trained(device, recipe_of("bf16"), steps=2)
        if device.type == "cuda":
            with pytest.raises(RuntimeError, match="kernel"):
                trained(device, recipe_of("fp32"), steps=1)
    assert_alike(restricted, trained(device, recipe_of("bf16"), steps=2), 1e-2)


def test_a_fused_kernel_is_what_is_chosen(device: torch.device) -> None:
    """Without a ban: PyTorch takes its flash kernel or cuDNN's, never the one that writes out the scores."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with engine_on(device, recipe_of("bf16")) as bench, torch.profiler.profile(activities=activities) as profile:
        step(bench, device, seed=0)
    chosen = {event.key for event in profile.key_averages() if "_scaled_dot_product" in event.key}
    assert chosen, "no attention was seen"
    assert not any("math" in name for name in chosen), chosen
    assert any("flash" in name or "cudnn" in name for name in chosen), chosen


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_compiled_layers_equal_eager_ones(device: torch.device, precision: str) -> None:
    """With recomputation too, as large models have it."""
    eager = trained(device, recipe_of(precision), steps=3)
    assert_alike(trained(device, recipe_of(precision, compile=True), steps=3), eager, 1e-2)
    recomputed = recipe_of(precision, compile=True, recompute_granularity="full")
    assert_alike(trained(device, recomputed, steps=3), eager, 1e-2)


class _Memory:
    """`with _Memory(device) as used: ...`; afterwards `used.peak`: the most bytes allocated beyond those at the start, 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.peak = device, 0

    def __enter__(self) -> _Memory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before


def test_the_loss_never_holds_the_logits(device: torch.device) -> None:
    """Head and cross-entropy with both gradients: equal to PyTorch's over whole fp32 logits, at the peak in less than half the
    memory of those logits alone."""
    n, h, v, chunk = 4096, 256, 32_000, 256
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = (0.05 * torch.randn(v, h, generator=generator)).to(device, torch.bfloat16).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    counted = (torch.rand(n, generator=generator) < 0.75).float().to(device)

    def apart(loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (loss / n).backward()
        assert hidden.grad is not None and weight.grad is not None
        found = loss.detach().float(), hidden.grad.float(), weight.grad.float()
        hidden.grad = weight.grad = None
        return found

    groups = _alone()
    with _Memory(device) as used:
        ours = apart(HeadLoss.apply(hidden, weight, labels, counted, v, chunk, groups.tensor, True))
    destroy_groups()
    logits = hidden.float() @ weight.float().t()
    theirs = apart((F.cross_entropy(logits, labels, reduction="none") * counted).sum())
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine - reference).norm() < 1e-2 * reference.norm()
    assert used.peak < 0.5 * n * v * 4
    assert device.type == "cpu" or used.peak > 0


def _alone() -> ParallelGroups:
    return create_groups(recipe_of("fp32").layout(1))


def _generated(recipe: Recipe, device: torch.device, settings: GenerateConfig) -> list[list[int]]:
    prompts = [[5, 9, 14, 3], [7], [11, 12, 13, 14, 15, 16, 17]]
    with engine_on(device, inference_recipe(recipe)) as bench:
        return generate(bench.engine.chunks, bench.groups, prompts, settings, EOD, device)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_generates(device: torch.device, precision: str) -> None:
    """Drawn text depends on the seed; greedy text of decided logits is that of the unfused attention."""
    recipe = recipe_of(precision, model={"init_method_std": 0.2})
    drawn = GenerateConfig(max_new_tokens=24, temperature=1.0, top_p=0.95, seed=7)
    texts = _generated(recipe, device, drawn)
    assert texts == _generated(recipe, device, drawn)
    assert texts != _generated(recipe, device, drawn.model_copy(update={"seed": 8}))
    assert all(text and all(0 <= token < 1000 for token in text) for text in texts)
    if precision == "fp32":
        local = recipe_of(precision, model={"init_method_std": 0.2, "attention_backend": "local"})
        greedy = GenerateConfig(max_new_tokens=12, temperature=0.0)
        assert _generated(recipe, device, greedy) == _generated(local, device, greedy)
