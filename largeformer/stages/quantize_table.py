"""What `quantize` tells of each linear layer, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.config.quantize import QuantizeConfig
from largeformer.errors import BadInputError, StageFailed

if TYPE_CHECKING:
    from largeformer.compression.quantization.layers import LayerError
    from largeformer.evaluation.quality import Quality
    from largeformer.models.shards import Shard


def check_finite(shards: Sequence[Shard], checkpoint: Path) -> None:
    """Raise BadInputError where weights of the model are not finite. Collective."""
    from largeformer.parallel.agreement import gather

    own = [shard.key for shard in shards if not shard.parameter.isfinite().all()]
    if wrong := [key for keys in gather(own) for key in keys]:
        raise BadInputError(f"{wrong[0]} holds weights that are not finite: {checkpoint} is no sound checkpoint")


def check_outputs(errors: Mapping[str, LayerError], checkpoint: Path) -> None:
    """Raise BadInputError where a layer's outputs are not finite on the calibration text."""
    wrong = [name for name, error in errors.items() if not math.isfinite(error.relative)]
    if wrong:
        raise BadInputError(f"the outputs of {wrong[0]} on the calibration text are not finite: {checkpoint} is no sound checkpoint")


def figures(settings: QuantizeConfig, quality: Quality) -> dict[str, Any]:
    """Of the whole model, before and after. Raises StageFailed where a loss is not finite."""
    if not math.isfinite(quality.loss) or not math.isfinite(quality.reference_loss):
        raise StageFailed([f"the loss on the test split is {quality.reference_loss} before and {quality.loss} after: it is not finite"])
    bits = quality.reference_loss * quality.tokens / math.log(2) / quality.bytes if quality.bytes else math.nan
    return {
        "scheme": settings.scheme,
        "method": settings.method,
        "smoothquant": settings.smoothquant is not None,
        "calibration_windows": settings.calibration.samples,
        "perplexity_before": math.exp(min(quality.reference_loss, 700.0)),
        "bits_per_byte_before": bits,
        "split": "test",
        **quality.metrics(),
    }


def error_table(layers: Sequence[str], errors: Mapping[str, LayerError], floats: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A row for each of `layers`, all of the model's linear ones: what it is off, which layers that the recipe keeps have no figures of,
    whether it stays float, as those in `floats` do, and whether it is kept."""
    table: dict[str, dict[str, Any]] = {}
    for name in layers:
        error = errors.get(name)
        figures = {} if error is None else {"relative_error": error.relative, "sqnr_db": error.sqnr_db}
        table[name] = {**figures, "float": name in floats, "kept": error is None}
    return table


def worst(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over the layers of a table that become integers: how many, the worst and its error, the mean; None where there are none."""
    errors = {name: row["relative_error"] for name, row in table.items() if not row["float"]}
    furthest = max(errors, key=errors.__getitem__, default=None)
    mean = sum(errors.values()) / len(errors) if errors else None
    return {"integer_layers": len(errors), "worst_layer": furthest, "worst_error": errors.get(furthest or ""), "mean_error": mean}
