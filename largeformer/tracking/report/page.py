"""One HTML page about one or several runs, for a browser without a network: data as JSON, and the script that draws it.

The page is built from text nodes, never from markup, and the JSON holds no `<`: what a model writes stays text.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from largeformer import __version__
from largeformer.tracking.names import ALERTS, chart_name
from largeformer.tracking.report.collect import Run, Stage, shown
from largeformer.tracking.report.thin import thin

MOST_BUCKETS = 1200
"""Parts of a curve of which the lowest and the highest value are drawn: more than a screen has columns."""
_BUCKETS_IN_ALL = 5000  # over all curves that are compared, so that the page stays small
_MOST_EVENTS = 300  # of a kind, drawn and listed
_KNOWN = ("event", "step", "time")
_QUIET = ("saved", "sample")  # events that are counted, not drawn: there are many, and nothing went wrong

_TITLES = {
    "train/loss": ("Loss", "nats per token"),
    "train/lr": ("Learning rate", ""),
    "train/grad_norm": ("Gradient norm", "before clipping"),
    "perf/tokens_per_s": ("Throughput", "tokens per second"),
    "memory/peak_gib": ("Memory", "peak GiB of the fullest rank"),
    "val/bits_per_byte": ("Bits per byte", "validation"),
    "perf/mfu": ("Model FLOP utilisation", "share of the peak"),
    "perf/step_time_s": ("Step time", "seconds"),
    "perf/tflops_per_device": ("TFLOP/s", "per device"),
    "train/loss_scale": ("Loss scale", ""),
    "train/skipped": ("Skipped steps", "so far"),
}
_OVERLAID = {"val/loss": "train/loss"}  # drawn into another's chart
_AXES = ("step", "tokens", "samples")


def render(runs: Sequence[Run]) -> str:
    """The page. Numbers are drawn with seven digits; the full ones stand in `metrics.jsonl`."""
    data = json.dumps(report_data(runs), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        data = data.replace(character, escaped)
    page = _asset("page.html")
    for mark, text in (("/*STYLE*/", _asset("style.css")), ("/*SCRIPT*/", _asset("chart.js") + _asset("page.js")), ("/*DATA*/", data)):
        page = page.replace(mark, text, 1)
    return page


def report_data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script draws."""
    trained = [(run, stage) for run in runs for stage in run.stages if stage.training or stage.validation]
    buckets = max(50, min(MOST_BUCKETS, _BUCKETS_IN_ALL // max(1, len(trained))))
    labels = _labels(trained)
    curves = [_curve(label, stage, buckets) for label, (_, stage) in zip(labels, trained, strict=True)]
    return {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "runs": [_run(run) for run in runs],
        "curves": curves,
        "charts": [*_charts({name for curve in curves for name in curve["series"]})],
        "differences": [*_differences(labels, [stage for _, stage in trained])],
    }


def _asset(name: str) -> str:
    return files("largeformer.tracking.report").joinpath(name).read_text(encoding="utf-8")


def _labels(trained: Sequence[tuple[Run, Stage]]) -> list[str]:
    """Short names that tell the curves apart: the run's, with the stage or the path where that is not enough."""
    short = [run.name for run, _ in trained]
    staged = [f"{run.name} / {stage.name}" for run, stage in trained]
    pathed = [f"{run.path} / {stage.name}" for run, stage in trained]
    return next((names for names in (short, staged) if len(set(names)) == len(names)), pathed)


def _curve(label: str, stage: Stage, buckets: int) -> dict[str, Any]:
    points = {
        chart_name(column): _points(rows, column)
        for rows in (stage.training, stage.validation)
        for column in dict.fromkeys(name for row in rows for name in row)
        if column not in _AXES
    }
    # A column of zeros alone, such as that of skipped steps, is no curve.
    series = {name: thin(found, buckets).as_json() for name, found in points.items() if any(value for _, value in found)}
    tokens = thin(_points(stage.training, "tokens"), buckets)
    return {
        "label": label,
        "series": series,
        "tokens": tokens.as_json(),
        "events": [*_events(stage)],
        "counts": dict(Counter(str(event.get("event")) for event in stage.events)),
        "facts": [*_facts(stage)],
    }


def _points(rows: Sequence[dict[str, Any]], column: str) -> list[tuple[int, float]]:
    return [(row["step"], float(row[column])) for row in rows if _is_number(row.get(column))]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _events(stage: Stage) -> Iterator[dict[str, Any]]:
    """What happened, the last of each kind where there were many; a value that was not finite is told like an event."""
    told = [
        (str(event.get("event")), event["step"], {k: v for k, v in event.items() if k not in _KNOWN}, event.get("time"))
        for event in stage.events
        if event.get("event") not in _QUIET
    ]
    named = {step for kind, step, _, _ in told if kind == "nonfinite"}
    rows = (row for row in stage.training if row.get("nonfinite") and row["step"] not in named)
    told += [("nonfinite", row["step"], row["nonfinite"], None) for row in rows]
    seen: Counter[str] = Counter()
    kept = []
    for kind, step, fields, time in reversed(told):
        seen[kind] += 1
        if seen[kind] <= _MOST_EVENTS:
            text = ", ".join(f"{key} {shown(value)}" for key, value in fields.items()) if isinstance(fields, dict) else shown(fields)
            level = ALERTS.get(kind, "INFO")
            kept.append({"kind": kind, "step": step, "text": text, "time": str(time or ""), "level": level.lower()})
    yield from sorted(kept, key=lambda event: event["step"])


def _facts(stage: Stage) -> Iterator[tuple[str, str]]:
    """The row of the table of runs: label and value."""
    last = stage.training[-1] if stage.training else {}
    losses = [row["val_loss"] for row in stage.validation if _is_number(row.get("val_loss"))]
    yield "Steps", f"{last.get('step', 0):,}"
    yield "Tokens", _value(last.get("tokens"), ",.0f")
    yield "Training loss", _value(last.get("loss"), ".4f")
    yield "Validation loss", _value(losses[-1] if losses else None, ".4f")
    yield "Best", _value(min(losses, default=None), ".4f")
    yield "Tokens/s, median", _value(_middle(stage, "tokens_per_s"), ",.0f")
    yield "MFU, median", _value(_middle(stage, "mfu"), ".1%")
    yield (
        "Peak memory",
        _value(max((row["memory_gib"] for row in stage.training if _is_number(row.get("memory_gib"))), default=None), ".2f", " GiB"),
    )


def _middle(stage: Stage, column: str) -> float | None:
    values = [row[column] for row in stage.training if _is_number(row.get(column))]
    return statistics.median(values) if values else None


def _value(number: Any, form: str, unit: str = "") -> str:
    return format(number, form) + unit if _is_number(number) else "\u2013"


def _charts(names: set[str]) -> Iterator[dict[str, Any]]:
    order = [*_TITLES, *sorted(names - {*_TITLES})]
    overlaid = {name for name, into in _OVERLAID.items() if into in names}
    for name in order:
        if name in names and name not in overlaid:
            title, unit = _TITLES.get(name, (name, ""))
            more = [other for other, into in _OVERLAID.items() if into == name and other in names]
            yield {"id": name, "title": title, "unit": unit, "series": [name, *more]}


def _differences(labels: Sequence[str], stages: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    """Keys of the recipes that are not the same everywhere."""
    if len(labels) < 2:
        return
    for key in dict.fromkeys(key for stage in stages for key in stage.config):
        values = [shown(stage.config[key]) if key in stage.config else "\u2013" for stage in stages]
        if len(set(values)) > 1 and not key.startswith(("run.name", "run.output_dir")):
            yield {"key": key, "values": values}


def _run(run: Run) -> dict[str, Any]:
    configs = {stage.config_text: stage.name for stage in run.stages if stage.config_text}
    return {
        "name": run.name,
        "path": str(run.path),
        "status": str(run.status.get("status", "unknown")),
        "error": str(run.status.get("error", "")),
        "problems": run.problems,
        "stages": [_lineage(stage) for stage in run.stages],
        "configs": [{"stage": name, "text": text} for text, name in configs.items()],
        "samples": [*_samples(run)],
    }


def _lineage(stage: Stage) -> dict[str, Any]:
    made = stage.artifact
    if made is None:
        return {"name": stage.name, "finished": False, "identity": "", "parents": [], "metrics": []}
    numbers = [[key, _short(value)] for key, value in made.metrics.items() if isinstance(value, str | int | float) and key != "sample"]
    parents = [[kind, identity] for kind, identity in made.parents.items()]
    return {"name": stage.name, "finished": True, "identity": made.identity, "parents": parents, "metrics": numbers}


def _samples(run: Run) -> Iterator[dict[str, Any]]:
    for stage in run.stages:
        for sample in stage.samples:
            yield {
                "stage": stage.name,
                "step": sample["step"],
                "prompt": str(sample.get("prompt", "")),
                "text": str(sample.get("text", "")),
            }
        if stage.artifact is not None and isinstance(stage.artifact.metrics.get("sample"), str):
            yield {"stage": stage.name, "step": None, "prompt": "", "text": stage.artifact.metrics["sample"]}


def _short(value: Any) -> str:
    return (
        f"{value:,.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int) and not isinstance(value, bool)
        else str(value)
    )
