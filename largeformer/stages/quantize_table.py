"""What `quantize` tells of each linear layer, and of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largeformer.compression.quantization.layers import LayerError


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
