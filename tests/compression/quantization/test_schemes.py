"""Scales and rounding are compressed-tensors' own, and each observer finds what it is defined by."""

from __future__ import annotations

import math

import pytest
import torch

from largeformer.compression.quantization.calibration import Histogram
from largeformer.compression.quantization.schemes import Given, Scheme, library_scheme, rounded, rounded_inputs, scale_of, weight_scales

pytest.importorskip("compressed_tensors")
SCHEMES = {
    "W8": Scheme(8),
    "W8, asymmetric": Scheme(8, symmetric=False),
    "W4 in groups": Scheme(4, group_size=16),
    "W4 in groups, asymmetric": Scheme(4, group_size=16, symmetric=False),
}


def weights(rows: int = 24, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    made = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    made[0, 5] = 9.0
    made[:, 7] = 0.0
    made[4] = 0.0
    return made


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_the_librarys(scheme: Scheme, dtype: torch.dtype) -> None:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    matrix, theirs = weights(), library_scheme(scheme).weights
    grouped = matrix.unflatten(1, (-1, scheme.group_size or 64))
    scale, zero_point = calculate_qparams(*grouped.aminmax(dim=2), theirs)
    given = weight_scales(matrix, scheme, dtype)
    assert torch.equal(given.scale, scale.to(dtype).float())
    expected = fake_quantize(matrix, given.scale, zero_point.float(), theirs)
    assert torch.equal(rounded(matrix, given, scheme), expected)
    assert (rounded(matrix, given, scheme)[matrix == 0] == 0).all(), "a pruned weight stays pruned"


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_scale_of_least_error(scheme: Scheme) -> None:
    """No shrunk range leaves a smaller error in any channel or group, and in some it is smaller than that of the extremes."""
    matrix = weights()
    grouped = matrix.unflatten(1, (-1, scheme.group_size or 64))

    def error(given: Given) -> torch.Tensor:
        return (rounded(matrix, given, scheme).view_as(grouped) - grouped).square().sum(dim=2)

    found = error(weight_scales(matrix, scheme, torch.float32, "mse"))
    low, high = grouped.aminmax(dim=2)
    for shrink in (1.0, 0.9, 0.7, 0.5, 0.3):
        assert (found <= error(scale_of(low * shrink, high * shrink, scheme, torch.float32)) + 1e-9).all()
    if scheme.bits == 4:
        assert found.sum() < 0.95 * error(weight_scales(matrix, scheme, torch.float32)).sum()


def test_inputs_by_their_formula() -> None:
    inputs = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    scale = inputs.abs().amax(dim=-1, keepdim=True) / 127.5
    assert torch.equal(rounded_inputs(inputs), (inputs / scale).clamp(-128, 127).round() * scale)
    static = torch.tensor([0.01])
    assert rounded_inputs(inputs, static).abs().max() <= 1.28
    torch.testing.assert_close(rounded_inputs(inputs, static), inputs.clamp(-1.28, 1.27), rtol=0, atol=0.00501)


def histogram(values: torch.Tensor) -> Histogram:
    made = Histogram(values.abs().max())
    for part in values.split(100):
        made.update(part)
    return made


def test_percentile_of_a_histogram() -> None:
    values = torch.randn(4000, 8, generator=torch.Generator().manual_seed(2))
    seen = histogram(values)
    for percent in (50.0, 99.0, 99.9, 100.0):
        exact = torch.quantile(values.abs().flatten(), percent / 100).item()
        assert abs(seen.percentile(percent).item() - exact) <= 2 * seen.largest.item() / 4096
    assert seen.percentile(100.0) == seen.largest


def test_the_range_of_least_error() -> None:
    """Against every range tried one by one on the values themselves: heavy tails are cut off."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(20_000, 4, generator=generator) * torch.rand(20_000, 1, generator=generator).pow(-0.35)
    found = histogram(values).least_error().item()

    def error(largest: float) -> float:
        return (rounded_inputs(values, torch.tensor([largest / 127.5])) - values).square().mean().item()

    largest = values.abs().max().item()
    best = min(error(largest * step / 200) for step in range(1, 201))
    assert error(found) <= best * 1.01
    assert found < 0.9 * largest
    assert math.isfinite(found)
