"""The recipe's section `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from largeformer.config.section import NonNegative, Positive, PositiveInt, Probability, Section

ExportFormat = Literal["hf", "hf-int8", "hf-int8-static", "hf-w8a16", "hf-int4", "onnx", "largeformer"]


class ThresholdsConfig(Section):
    """What an export may differ from its source by, over held-out text. Null: what `export/gate.py` says of the format."""

    max_logit_difference: Positive | None = None
    max_kl: Positive | None = None
    min_top1_agreement: Probability | None = None
    max_perplexity_increase: NonNegative | None = None


class ExportConfig(Section):
    """`formats` null: `hf`, `hf-int8` and `onnx`, those of them that can hold the model's shape; after a stage `quantize`, in place of
    `hf-int8` the format of its scheme.

    `keep_float`: linear layers that stay floats in Hugging Face's integer formats, by their names there, such as
    `model.layers.0.mlp.down_proj`; `onnx_keep_float` the same of ONNX, where no more float products than these may be left.
    `reduce_range` null: seven bits in ONNX only where this CPU has no VNNI.
    """

    formats: Annotated[tuple[ExportFormat, ...], Field(min_length=1)] | None = None
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_shard_gb: Positive = 5.0
    group_size: PositiveInt = 128
    symmetric: bool = True
    keep_float: tuple[str, ...] = ("lm_head",)
    onnx_keep_float: tuple[str, ...] = ()
    reduce_range: bool | None = None
    gate_tokens: PositiveInt = 4096
    thresholds: ThresholdsConfig = ThresholdsConfig()
