"""The end of a chain on one screen: every model and every export of it, and a plot of size against quality."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from largeformer.artifact import Artifact, write_atomically
from largeformer.config.schema import Recipe
from largeformer.stages.quality_plot import plot

JSON, PLOT = "quality.json", "quality.svg"


@dataclass(frozen=True)
class Row:
    """A model of the chain, or an export of one of them. `perplexity_increase`, `kl` and `top1_agreement` are beside the model `beside`:
    the chain's first, of an export the one that it was made from. `increase_from_first`: of the perplexity, beside the chain's first over
    the same tokens; None where the export was compared over others. Sizes in bytes, losses by token, latency in milliseconds by shape and
    threads; `latency_ratio`: to that of the chain's first, taking turns."""

    name: str
    parameters: int | None
    bytes: int
    perplexity: float | None
    increase_from_first: float | None
    bits_per_byte: float | None
    beside: str | None
    perplexity_increase: float | None
    kl: float | None
    top1_agreement: float | None
    sparsity: float | None
    latency_ms: dict[str, float]
    latency_ratio: dict[str, float]
    tokens_per_s: float | None
    passed: bool


def write_report(recipe: Recipe, failed: Artifact | None = None) -> None:
    """Write `quality.json` and `quality.svg` into the run folder and print the tables. `failed`: a stage that was measured and has no
    manifest any more, with which the report ends. On rank 0 only. Raises OSError where the folder cannot be written to."""
    run = Path(recipe.run.output_dir)
    rows = list(_rows(recipe, run, failed))
    write_atomically(run / JSON, (json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n").encode())
    write_atomically(run / PLOT, plot(_points(rows)).encode())
    show(rows)
    print(f"quality: {run / JSON} {run / PLOT}", flush=True)


def _rows(recipe: Recipe, run: Path, failed: Artifact | None) -> Iterator[Row]:
    made: dict[str, Artifact] = {}
    for entry in recipe.run.stages:
        is_last = failed is not None and failed.path == run / entry.name
        artifact = failed if is_last else Artifact.read(run / entry.name)
        if artifact is None:
            continue
        made[artifact.identity] = artifact
        if "quality" in artifact.metrics:
            yield _model_row(entry.name, artifact.metrics)
        if artifact.kind == "export":
            yield from _export_rows(entry.name, artifact, made)
        if is_last:  # what stands behind it is an earlier run's
            return


def _model_row(name: str, metrics: dict[str, Any]) -> Row:
    found = metrics["quality"]
    told = ("perplexity", "perplexity_increase", "bits_per_byte", "kl", "top1_agreement")
    figures = {key: found[key] if math.isfinite(found["loss"]) and math.isfinite(found[key]) else None for key in told}
    return Row(
        name=name,
        parameters=found["parameters"],
        bytes=found["weight_bytes"],
        **figures,
        increase_from_first=figures["perplexity_increase"],
        beside=found["reference"],
        sparsity=metrics.get("sparsity", {}).get("overall"),
        latency_ms={_case(one): one["model_ms"] for one in found["latency"]},
        latency_ratio={_case(one): one["model_ms"] / one["reference_ms"] for one in found["latency"]},
        tokens_per_s=max((one["tokens_per_s"] for one in found["latency"]), default=None),
        passed=found["passed"],
    )


def weight_bytes(sizes: Mapping[str, int], model: str) -> int:
    """Of a format's files, by name, those that hold the weights of `model`: `model_int8` of `onnx/`, or all there are."""
    weights = {part: size for part, size in sizes.items() if not part.endswith((".json", ".md", ".model", ".txt"))}
    own = {part: size for part, size in weights.items() if part.split(".")[0] == model.split(".")[0]} or weights
    return sum(own.values())


def _export_rows(name: str, export: Artifact, made: Mapping[str, Artifact]) -> Iterator[Row]:
    """made: the stages before it, by identity."""
    metrics, source, beside = export.metrics, *_source(export, made)
    for form, figures in metrics["formats"].items():
        for file, parity in figures["parity"].items():
            timed = metrics.get("latency", {}).get(f"{form}/{file}", [])
            zeros = figures.get("sparsity", {}).get(file)
            yield Row(
                name=f"{name}/{form}" + (f"/{file}" if len(figures["parity"]) > 1 else ""),
                parameters=metrics.get("parameters"),
                bytes=weight_bytes(figures["bytes"], file),
                beside=beside,
                **{key: parity.get(key) for key in ("perplexity", "perplexity_increase", "kl", "top1_agreement")},
                **_over_the_same_text(export, parity, source),
                sparsity=zeros["zeros"] / max(1, zeros["weights"]) if zeros else None,
                latency_ms={_case(one): one["model_ms"] for one in timed},
                latency_ratio={},
                tokens_per_s=max((one["tokens_per_s"] for one in timed), default=None),
                passed=True,
            )


def _source(export: Artifact, made: Mapping[str, Artifact]) -> tuple[Artifact | None, str | None]:
    """The stage that an export's model comes from, None where it is none of this chain; and what the export was compared with, in words.
    Its gate reads the floats of a model that is to be integers."""
    for kind, identity in export.parents.items():
        if kind != "prepare":
            source = made.get(identity)
            return source, f"{kind} {identity}" if source is None else source.path.name + (", as floats" if kind == "quantize" else "")
    return None, None


def _over_the_same_text(export: Artifact, parity: Mapping[str, Any], source: Artifact | None) -> dict[str, float | None]:
    """What follows where the export was compared over the windows that its source was measured on: its perplexity beside that of the
    chain's first model there, and bits per byte. None of a figure that does not follow."""
    quality = source.metrics.get("quality", {}) if source is not None else {}
    windows = (parity.get("tokens"), export.parents.get("prepare"), _seq_length(export.path))
    perplexity = parity.get("perplexity")
    if not perplexity or windows != (quality.get("tokens"), quality.get("text"), quality.get("seq_length")):
        return {"increase_from_first": None, "bits_per_byte": None}
    loss, text_bytes = math.log(perplexity), quality["bytes"]
    return {
        "increase_from_first": math.expm1(min(loss - quality["reference_loss"], 700.0)),
        "bits_per_byte": loss * quality["tokens"] / math.log(2) / text_bytes if text_bytes else None,
    }


def _seq_length(export: Path) -> int | None:
    """How long the windows are that an export was compared over; None where its folder does not say."""
    try:
        recipe = yaml.safe_load((export / "config.yaml").read_text())
        return min(int(recipe["model"]["seq_length"]), int(recipe["export"]["gate_tokens"]))
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None


def _case(timed: dict[str, Any]) -> str:
    return f"{timed['shape']}, {timed['threads']} thread{'s' if timed['threads'] > 1 else ''}"


def show(rows: Sequence[Row]) -> None:
    """Print the tables: what each model is worth, and, where it is measured, how fast it is."""
    _print_table(
        "quality",
        ("parameters", "MB", "perplexity", "from the first", "bits/byte", "beside", "change", "KL", "top-1", "zeros", ""),
        {
            row.name: (
                "" if row.parameters is None else f"{row.parameters / 1e6:.2f}M",
                f"{row.bytes / 1e6:.1f}",
                _number(row.perplexity, ".3f"),
                _number(row.increase_from_first, "+.2%"),
                _number(row.bits_per_byte, ".4f"),
                row.beside or "",
                _number(row.perplexity_increase, "+.2%"),
                _number(row.kl, ".4f"),
                _number(row.top1_agreement, ".2%"),
                _number(row.sparsity, ".0%"),
                "pass" if row.passed else "FAIL",
            )
            for row in rows
        },
    )
    timed = [row for row in rows if row.latency_ms]
    cases = list(dict.fromkeys(case for row in timed for case in row.latency_ms))
    if timed:
        _print_table(
            "latency in ms, and times the first's",
            (*cases, "tokens/s at best"),
            {row.name: (*(_latency(row, case) for case in cases), _number(row.tokens_per_s, ",.0f")) for row in timed},
        )


def _print_table(title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(width=max(Console().width, 150)).print(table)


def _latency(row: Row, case: str) -> str:
    ratio = f" x{row.latency_ratio[case]:.2f}" if case in row.latency_ratio else ""
    return _number(row.latency_ms.get(case), ".2f") + ratio


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _points(rows: Sequence[Row]) -> list[tuple[str, int, float]]:
    return [(row.name, row.bytes, row.perplexity) for row in rows if row.perplexity is not None and row.bytes > 0]
