"""The report of a prepare as one HTML page: no script, no network, figures as inline SVG, readable in light and in dark.

Everything that comes from the data passes through `_text`. The page depends on the statistics alone: the same data give the same page.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from rich.filesize import decimal

from largeformer.data.preparation.report_style import STYLE
from largeformer.data.preparation.statistics import SourceStatistics, Statistics

_WORDS = re.compile(r"\w+|\s+|[^\w\s]")
_INVISIBLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_SPLITS = ("train", "valid", "test")
_TOP = 12


def report_page(statistics: Statistics, metrics: dict[str, Any]) -> str:
    sections = [
        ("Sources", _sources(statistics.sources)),
        ("Length of documents", _histogram(statistics)),
        ("What was dropped", _dropped(statistics)),
        ("What cleaning changed", _bars(statistics.totals("changed"), statistics.total("read"), "No cleaning step changed anything.")),
        ("Documents before and after", "".join(_sample(sample) for sample in statistics.samples)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Prepared data</title><style>{STYLE}</style></head>\n<body><main>"
        f"<h1>Prepared data</h1>{_figures(statistics, metrics)}{body}</main></body></html>\n"
    )


def _figures(statistics: Statistics, metrics: dict[str, Any]) -> str:
    tokens = max(metrics["tokens"], 1)
    figures = [
        (f"{metrics['tokens']:,}", "tokens"),
        (f"{metrics['documents']:,}", f"documents of {statistics.inputs:,} inputs"),
        (decimal(metrics["bytes"]), "of text"),
        (f"{metrics['tokens_per_byte']:.4f}", f"tokens per byte: {1 / max(metrics['tokens_per_byte'], 1e-9):.2f} bytes per token"),
        (f"{metrics['unknown_rate']:.3%}", "unknown tokens"),
        (f"{metrics['rejected']:,}", "inputs in quarantine"),
    ]
    boxes = "".join(f"<div class=figure><b>{value}</b><span>{label}</span></div>" for value, label in figures)
    splits = [(name, metrics[f"{name}_tokens"]) for name in _SPLITS]
    parts = "".join(
        f'<div class="part p{i}" style="flex-grow:{max(count, tokens / 200):.0f}" title="{name}: {count:,} tokens"></div>'
        for i, (name, count) in enumerate(splits)
        if count
    )
    legend = "".join(f'<li><i class="p{i}"></i>{name} {count:,} ({count / tokens:.1%})</li>' for i, (name, count) in enumerate(splits))
    return f"<div class=figures>{boxes}</div><div class=stack>{parts}</div><ul class=legend>{legend}</ul>"


def _sources(sources: Sequence[SourceStatistics]) -> str:
    total = max(sum(source.tokens for source in sources), 1)
    head = "".join(
        f"<th>{name}</th>" for name in ("", "share of tokens", "tokens", "documents", "dropped", "quarantined", "tokens/byte", "unknown")
    )
    rows = "".join(
        f"<tr><th scope=row>{_text(source.path)}</th><td class=wide>{_bar(source.tokens / total)}</td><td>{source.tokens:,}</td>"
        f"<td>{source.documents:,}</td><td>{sum(source.dropped.values()):,}</td><td>{source.rejected:,}</td>"
        f"<td>{source.tokens / max(source.bytes, 1):.4f}</td><td>{source.unknown / max(source.tokens, 1):.3%}</td></tr>"
        for source in sources
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _histogram(statistics: Statistics) -> str:
    """Documents by length, in bins that double."""
    counts = [sum(source.lengths[i] for source in statistics.sources) for i in range(len(statistics.sources[0].lengths))]
    filled = [i for i, count in enumerate(counts) if count]
    first, last, most = filled[0], filled[-1], max(counts)
    total, width, height, step = sum(counts), 720, 200, 720 / max(last - first + 1, 8)
    marks = []
    for i in range(first, last + 1):
        x, tall = (i - first) * step, height * counts[i] / most
        label = f"{2**i:,} to {2 ** (i + 1) - 1:,} tokens: {counts[i]:,} documents ({counts[i] / total:.1%})"
        marks.append(f'<g><title>{label}</title><rect class=hit x="{x:.1f}" y="0" width="{step:.1f}" height="{height + 24}"/>')
        if counts[i]:
            marks.append(
                f'<rect class=mark x="{x + 1:.1f}" y="{24 + height - tall:.1f}" width="{step - 2:.1f}" height="{max(tall, 1):.1f}" rx="2"/>'
            )
            marks.append(f'<text x="{x + step / 2:.1f}" y="{18 + height - tall:.1f}">{_short(counts[i])}</text>')
        marks.append(f'<text class=tick x="{x:.1f}" y="{height + 42}">{2**i:,}</text></g>')
    svg = f'<svg viewBox="-14 0 {width + 28} {height + 64}" role="img" aria-label="documents by length">{"".join(marks)}'
    axis = f'<line x1="0" x2="{width}" y1="{height + 24}" y2="{height + 24}"/>'
    return f'{svg}{axis}<text class=tick x="{width / 2}" y="{height + 60}">tokens, end of document included</text></svg>'


def _dropped(statistics: Statistics) -> str:
    reasons = {**statistics.totals("dropped"), **{f"quarantine: {k}": n for k, n in statistics.totals("quarantined").items()}}
    return _bars(reasons, statistics.inputs, "Every input was kept.")


def _bars(counts: dict[str, int], total: int, nothing: str) -> str:
    """The most frequent reasons, each with its share of `total`; a full bar is the largest of them."""
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if not top:
        return f"<p class=muted>{nothing}</p>"
    most = top[0][1]
    rows = "".join(
        f"<tr><th scope=row>{_text(name)}</th><td class=wide>{_bar(count / most)}</td><td>{count:,}</td>"
        f"<td>{count / max(total, 1):.2%}</td></tr>"
        for name, count in top[:_TOP]
    )
    rest = sum(count for _, count in top[_TOP:])
    more = f"<tr><th scope=row>{len(top) - _TOP} other reasons</th><td></td><td>{rest:,}</td><td></td></tr>" if rest else ""
    return f"<div class=scroll><table><tbody>{rows}{more}</tbody></table></div>"


def _bar(share: float) -> str:
    width = 100 * max(share, 0.004)
    return f'<svg class=bar viewBox="0 0 100 10" preserveAspectRatio="none"><rect class=mark width="{width:.2f}" height="10"/></svg>'


def _sample(sample: dict[str, Any]) -> str:
    """One document: what cleaning took is marked on the left, what it put there on the right."""
    place = _text(f"{sample['file']}:{sample['line']}")
    begins = f", from character {sample['start']:,}" if sample["start"] else ""
    whole = f"{sample['characters']:,} characters{begins}"
    if sample["dropped"] is not None:
        what, sides = f"dropped: {_text(sample['dropped'])}", _side("before", _text(sample["before"]))
    elif sample["changed"]:
        before, after = _marked(sample["before"], sample["after"])
        what, sides = f"changed by {_text(', '.join(sample['changed']))}", _side("before", before) + _side("after", after)
    else:
        what, sides = "unchanged", _side("text", _text(sample["before"]))
    return f"<article><h3>{what}</h3><p class=muted>{place}, {whole}</p><div class=sides>{sides}</div></article>"


def _side(title: str, content: str) -> str:
    return f'<figure><figcaption>{title}</figcaption><pre dir="auto">{content}</pre></figure>'


def _marked(before: str, after: str) -> tuple[str, str]:
    old, new = _WORDS.findall(before), _WORDS.findall(after)
    left, right = [], []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, come = _text("".join(old[i1:i2])), _text("".join(new[j1:j2]))
        left.append(f"<del>{gone}</del>" if kind != "equal" and gone else gone)
        right.append(f"<ins>{come}</ins>" if kind != "equal" and come else come)
    return "".join(left), "".join(right)


def _text(text: str) -> str:
    """Escaped, with what cannot be seen (control characters, marks of direction) shown as its number."""
    return "".join(_pieces(text))


def _pieces(text: str) -> Iterator[str]:
    end = 0
    for match in _INVISIBLE.finditer(text):
        yield escape(text[end : match.start()])
        yield f"<i class=code>{ord(match[0]):04X}</i>"
        end = match.end()
    yield escape(text[end:])


def _short(count: int) -> str:
    """`950`, `1.2k`, `34M`."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            value = count / size
            return f"{value:.1f}{letter}".replace(".0", "") if value < 10 else f"{value:.0f}{letter}"
    return str(count)
