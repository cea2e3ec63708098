"""The recipe's section `quantize`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from largeformer.config.calibration import CalibrationConfig
from largeformer.config.chain import TrainedSection
from largeformer.config.distill import LessonConfig
from largeformer.config.section import Positive, PositiveInt, Section


class SmoothQuantConfig(Section):
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438). `alpha`: how much of the difficulty goes from the activations to the weights.

    `projections`: not only norms take the factors in, but the values and the feed-forward's `up` as well, for what follows them.
    """

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    projections: bool = False


class GPTQConfig(Section):
    """GPTQ (Frantar et al. 2022, arXiv:2210.17323). `dampening`: of the mean of the Hessian's diagonal. `act_order`: the input channels
    with the largest activations first; groups stay as they lie."""

    block_size: PositiveInt = 128
    dampening: Positive = 0.01
    act_order: bool = False


class QuantizeConfig(TrainedSection):
    """`scheme`: bits of the weights and of the activations; 8-bit activations have a scale for each token, or in `w8a8_static` one that
    calibration found. Weights have a scale for each output channel, in `w4a16` for each `group_size` input channels of it.

    `method`: rtn rounds to nearest, gptq one column after another, qat trains with rounded weights (`train`, `optimizer`), with `distill`
    on what the model says that it was given; its keys are those of the section.
    `observer`: of static activations; `percentile` of their magnitudes counts with `percentile` alone. `weight_observer`: of the weights.
    `error_threshold`: linear layers whose output on the calibration text is off by more, relative to its norm, stay floats; null: 0.05
    for 8-bit weights, 0.3 for 4-bit ones. `keep_float`: others that do, by Hugging Face's names, such as `model.layers.0.mlp.down_proj`.
    `evaluation_tokens`: of the test split, on which the model is compared before and after; null: all of it.
    """

    scheme: Literal["w8a8", "w8a8_static", "w8a16", "w4a16"] = "w8a8"
    method: Literal["rtn", "gptq", "qat"] = "rtn"
    group_size: PositiveInt = 128
    symmetric: bool = True
    smoothquant: SmoothQuantConfig | None = None
    gptq: GPTQConfig = GPTQConfig()
    distill: LessonConfig | None = None
    observer: Literal["minmax", "percentile", "mse"] = "mse"
    percentile: Annotated[float, Field(gt=50.0, le=100.0)] = 99.99
    weight_observer: Literal["minmax", "mse"] = "minmax"
    calibration: CalibrationConfig = CalibrationConfig()
    error_threshold: Positive | None = None
    keep_float: tuple[str, ...] = ()
    evaluation_tokens: PositiveInt | None = None

    @property
    def trains(self) -> bool:
        return self.method == "qat"

    @property
    def bits(self) -> Literal[4, 8]:
        return 4 if self.scheme == "w4a16" else 8

    @property
    def activations(self) -> Literal["token", "tensor"] | None:
        """How 8-bit activations get their scale; None where activations stay floats."""
        kinds: dict[str, Literal["token", "tensor"]] = {"w8a8": "token", "w8a8_static": "tensor"}
        return kinds.get(self.scheme)

    @property
    def largest_error(self) -> float:
        """`error_threshold`, or what its null stands for."""
        return self.error_threshold or (0.05 if self.bits == 8 else 0.3)


def quantize_problems(quantize: QuantizeConfig) -> Iterator[str]:
    if quantize.activations and not quantize.symmetric:
        yield (
            f"quantize.symmetric false does not go with quantize.scheme {quantize.scheme}: no client computes with integer activations "
            "and weights that have a zero point; leave it true, or choose w8a16 or w4a16"
        )
    if quantize.distill is not None and not quantize.trains:
        yield f"quantize.distill teaches a training, and quantize.method {quantize.method} is none: set it to qat, or leave distill out"
    if quantize.method == "qat" and quantize.weight_observer != "minmax":
        yield (
            f"quantize.weight_observer {quantize.weight_observer} does not go with quantize.method qat, whose scales follow the largest "
            "weights from step to step: leave it minmax"
        )
