"""The end of a chain on one screen: every model and every export of it, and a plot of size against quality."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from largeformer.artifact import Artifact, write_atomically
from largeformer.config.schema import Recipe

JSON, PLOT = "quality.json", "quality.svg"


@dataclass(frozen=True)
class Row:
    """A model of the chain, or an export of its last one. Relative figures are beside the chain's first model (exports: beside the model
    that they were made from). Sizes in bytes, losses by token, latency in milliseconds by shape and threads."""

    name: str
    parameters: int | None
    bytes: int
    perplexity: float | None
    perplexity_increase: float | None
    bits_per_byte: float | None
    kl: float | None
    top1_agreement: float | None
    sparsity: float | None
    latency_ms: dict[str, float]
    tokens_per_s: float | None
    passed: bool


def write_report(recipe: Recipe) -> None:
    """Write `quality.json` and `quality.svg` into the run folder and print the table. On rank 0 only."""
    run = Path(recipe.run.output_dir)
    rows = list(_rows(recipe, run))
    write_atomically(run / JSON, (json.dumps([asdict(row) for row in rows], indent=2) + "\n").encode())
    write_atomically(run / PLOT, plot(rows).encode())
    show(rows)
    print(f"quality: {run / JSON} {run / PLOT}")


def _rows(recipe: Recipe, run: Path) -> Iterator[Row]:
    for entry in recipe.run.stages:
        artifact = Artifact.read(run / entry.name)
        if artifact is None:
            continue
        if "quality" in artifact.metrics:
            yield _model_row(entry.name, artifact.metrics)
        if artifact.kind == "export":
            yield from _export_rows(entry.name, artifact.metrics)


def _model_row(name: str, metrics: dict[str, Any]) -> Row:
    found = metrics["quality"]
    sparsity = metrics.get("sparsity", {}).get("overall")
    return Row(
        name=name,
        parameters=found["parameters"],
        bytes=found["weight_bytes"],
        **{key: found[key] for key in ("perplexity", "perplexity_increase", "bits_per_byte", "kl", "top1_agreement", "passed")},
        sparsity=sparsity,
        latency_ms={_case(one): one["model_ms"] for one in found["latency"]},
        tokens_per_s=max((one["tokens_per_s"] for one in found["latency"]), default=None),
    )


def _export_rows(name: str, metrics: dict[str, Any]) -> Iterator[Row]:
    latency = metrics.get("latency", {})
    for form, figures in metrics["formats"].items():
        for file, parity in figures["parity"].items():
            timed = latency.get(f"{form}/{file}", [])
            sizes = figures["bytes"]
            weights = {part: size for part, size in sizes.items() if not part.endswith((".json", ".md", ".model", ".txt"))}
            own = {part: size for part, size in weights.items() if part.split(".")[0] == file.split(".")[0]} or weights
            yield Row(
                name=f"{name}/{form}" + (f"/{file}" if len(figures["parity"]) > 1 else ""),
                parameters=metrics.get("parameters"),
                bytes=sum(own.values()),
                bits_per_byte=None,
                **{key: parity.get(key) for key in ("perplexity", "perplexity_increase", "kl", "top1_agreement")},
                sparsity=None,
                latency_ms={_case(one): one["model_ms"] for one in timed},
                tokens_per_s=max((one["tokens_per_s"] for one in timed), default=None),
                passed=True,
            )


def _case(timed: dict[str, Any]) -> str:
    return f"{timed['shape']}, {timed['threads']} thread{'s' if timed['threads'] > 1 else ''}"


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    cases = list(dict.fromkeys(case for row in rows for case in row.latency_ms))
    table = Table(title="quality", title_justify="left", box=None, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for heading in (
        "parameters",
        "MB",
        "perplexity",
        "change",
        "bits/byte",
        "KL",
        "top-1",
        "zeros",
        *(f"{case} (ms)" for case in cases),
        "",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            "" if row.parameters is None else f"{row.parameters / 1e6:.2f}M",
            f"{row.bytes / 1e6:.1f}",
            _number(row.perplexity, ".3f"),
            _number(row.perplexity_increase, "+.2%"),
            _number(row.bits_per_byte, ".4f"),
            _number(row.kl, ".4f"),
            _number(row.top1_agreement, ".2%"),
            _number(row.sparsity, ".0%"),
            *(_number(row.latency_ms.get(case), ".2f") for case in cases),
            "pass" if row.passed else "FAIL",
        )
    Console(width=max(Console().width, 150)).print(table)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


WIDTH, HEIGHT, LEFT, BOTTOM = 760, 440, 70, 50


def plot(rows: Sequence[Row]) -> str:
    """An SVG picture: megabytes, logarithmic, against perplexity; lower left is better."""
    points = [(row.name, row.bytes / 1e6, row.perplexity) for row in rows if row.perplexity is not None and row.bytes > 0]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"/>'
    across = _Scale([math.log10(size) for _, size, _ in points], LEFT, WIDTH - 170)
    up = _Scale([perplexity for _, _, perplexity in points], HEIGHT - BOTTOM, 30)
    drawn = [_text(WIDTH / 2 - 60, HEIGHT - 10, "size of the weights [MB]"), _text(8, 18, "perplexity on held-out text")]
    for value in up.ticks():
        y = up(value)
        drawn += [f'<line x1="{LEFT}" x2="{WIDTH - 20}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>', _text(12, y + 4, f"{value:.4g}")]
    for value in across.ticks():
        drawn.append(_text(across(value) - 12, HEIGHT - BOTTOM + 18, f"{10**value:.3g}"))
    below = -math.inf
    for name, size, perplexity in sorted(points, key=lambda point: up(point[2])):
        x, y = across(math.log10(size)), up(perplexity)
        below = max(y + 4, below + 14)  # labels do not cover each other
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#3465a4"/>', _text(x + 9, below, name)]
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


class _Scale:
    """From values to pixels, with a little room around."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        room = 0.08 * (max(values) - min(values)) or 0.05 * abs(values[0]) or 1.0
        self._low, self._high, self._start, self._end = min(values) - room, max(values) + room, start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        return [self._low + (self._high - self._low) * i / 5 for i in range(6)]


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'
