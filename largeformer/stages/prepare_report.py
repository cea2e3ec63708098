"""What a prepare leaves beside its pairs: metrics, statistics, the report page, and the table that ends it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from largeformer.artifact import MANIFEST, write_atomically
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.data.cleaning.deduplication import MinHasher
from largeformer.data.indexed import SPLITS, open_indexed, split_documents, split_tokens
from largeformer.data.indexed_writer import idx_path
from largeformer.data.preparation.merging import QUARANTINE, Base, Merged, Merger
from largeformer.data.preparation.pairs import link_pair
from largeformer.data.preparation.report import report_page
from largeformer.data.preparation.statistics import SourceStatistics, Statistics
from largeformer.data.preparation.workspace import FILES, STATISTICS, Workspace
from largeformer.data.reading.corpus import Source
from largeformer.data.tokenization.tokenizer import Tokenizer
from largeformer.errors import BadInputError
from largeformer.stages.common.claim import CONFIG
from largeformer.stages.common.tables import table_console

REPORT = "report.html"


@dataclass(frozen=True)
class Results:
    """The parts of `sources` (their new files), turned into everything that a prepare folder holds, in `work.merged`."""

    recipe: Recipe
    work: Workspace
    sources: Sequence[Source]
    tokenizer: Tokenizer

    def write(self) -> tuple[Statistics, dict[str, Any]]:
        """Raises BadInputError where too much was rejected, or nothing is left of a source. Returns the manifest's metrics too."""
        base = self.work.base_statistics()
        known = {source.name: source for source in base.sources}
        sources = {source.name: known.get(source.name, SourceStatistics(source.name, source.path)) for source in self.sources}
        statistics = Statistics(list(sources.values()), base.samples)
        out = self.work.fresh("merged")
        merger = self._merger(sources, out)
        first = merger.survey(sources, statistics, self._kept_quarantine(base))
        self._check_quarantine(statistics, out / QUARANTINE)
        merger.write(first, sources)
        for source in self.sources:
            if source.pair is not None and source.files:
                link_pair(source.pair, out / source.name, self.tokenizer, sources[source.name])
        _check_left(statistics)
        metrics = self._metrics(statistics)
        rows = [*self.work.base_files(), *(row for source in self.sources for row in source.rows())]
        write_atomically(out / FILES, "".join(f"{row}\n" for row in rows).encode())
        write_atomically(out / STATISTICS, statistics.dump())
        write_atomically(out / CONFIG, recipe_yaml(self.recipe).encode())
        write_atomically(out / REPORT, report_page(statistics, metrics).encode("utf-8", errors="replace"))
        return statistics, metrics

    def _merger(self, statistics: dict[str, SourceStatistics], out: Path) -> Merger:
        deduplicate = self.recipe.data.deduplicate
        near = deduplicate.near if deduplicate is not None else None
        signature = MinHasher(near).signature("a") if near is not None else np.empty(0, dtype=np.uint32)
        merged = [
            Merged(source.name, self.work.parts(source.name), Base(statistics[source.name].documents, statistics[source.name].tokens))
            for source in self.sources
            if source.pair is None
        ]
        return Merger(
            sources=merged,
            there=self.work.folder,
            out=out,
            work=self.work.fresh("scratch"),
            vocab_size=self.tokenizer.vocab_size,
            eod=self.tokenizer.eod,
            deduplicate=deduplicate,
            signature=(signature.dtype, signature.size),
        )

    def _kept_quarantine(self, base: Statistics) -> int:
        """Bytes of the quarantine's rows that are there already: as many rows as the base has rejected inputs."""
        rows = base.total("rejected")
        if not rows:
            return 0
        with (self.work.folder / QUARANTINE).open("rb") as handle:
            return sum(len(handle.readline()) for _ in range(rows))

    def _check_quarantine(self, statistics: Statistics, written: Path) -> None:
        threshold, rejected, inputs = self.recipe.data.quarantine_threshold, statistics.total("rejected"), statistics.inputs
        if rejected <= threshold * inputs:
            return
        if not (self.work.folder / MANIFEST).exists():
            written = written.replace(self.work.folder / QUARANTINE)
        with written.open("rb") as handle:
            first = json.loads(handle.readline())
        raise BadInputError(
            f"{rejected} of {inputs} inputs were rejected ({rejected / inputs:.2%}), data.quarantine_threshold allows {threshold:.2%}; "
            f"the first: {first['file']}:{first['line']}: {first['reason']}. Mend what {written} lists, or raise the threshold: "
            "what was encoded is kept"
        )

    def _metrics(self, statistics: Statistics) -> dict[str, Any]:
        tokens, size = statistics.total("tokens"), statistics.total("bytes")
        counted = ("name", "documents", "tokens", "bytes", "unknown", "rejected")
        return {
            "documents": statistics.total("documents"),
            "tokens": tokens,
            "bytes": size,
            "tokens_per_byte": tokens / max(size, 1),
            "rejected": statistics.total("rejected"),
            "dropped": statistics.totals("dropped"),
            "unknown_rate": statistics.total("unknown") / max(tokens, 1),
            "tokenizer_sha256": self.tokenizer.unique_identifiers["sha256"],
            **self._split_tokens(),
            "sources": [{name: getattr(source, name) for name in counted} for source in statistics.sources],
        }

    def _split_tokens(self) -> dict[str, int]:
        """Tokens of each split, over all sources."""
        tokens = dict.fromkeys(SPLITS, 0)
        for source, shares in zip(self.sources, self.recipe.data.splits, strict=True):
            prefix = self.work.merged / source.name
            if not idx_path(prefix).exists():
                prefix = self.work.folder / source.name
            dataset = open_indexed(prefix, self.tokenizer.vocab_size)
            for name, part in split_documents(shares, len(dataset)).items():
                tokens[name] += len(split_tokens(dataset, part))
        return {f"{name}_tokens": count for name, count in tokens.items()}


def _check_left(statistics: Statistics) -> None:
    problems = [
        f"data.sources path {source.path!r}: nothing is left of {source.read} documents ({_reasons(source.dropped)}): "
        "loosen data.cleaning or data.deduplicate, or leave the source out"
        for source in statistics.sources
        if not source.documents
    ]
    if problems:
        raise BadInputError(problems)


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1])) or "none was read"


def table(statistics: Statistics, metrics: dict[str, Any], folder: Path) -> None:
    """Print what came of each source, and of all."""
    console = table_console()
    shown = Table(title=escape(str(folder)), title_justify="left")
    shown.add_column("source", overflow="fold")
    for name in ("documents", "dropped", "quarantined", "tokens", "text", "tokens/byte", "unknown"):
        shown.add_column(name, justify="right")
    for source in statistics.sources:
        shown.add_row(escape(source.path), *_cells(source))
    if len(statistics.sources) > 1:
        shown.add_section()
        total = SourceStatistics("", "")
        for name in ("documents", "tokens", "bytes", "unknown", "rejected"):
            setattr(total, name, statistics.total(name))
        total.dropped = statistics.totals("dropped")
        shown.add_row("all", *_cells(total))
    console.print(shown, markup=False, highlight=False)
    lines = []
    if dropped := statistics.totals("dropped"):
        lines.append(f"dropped: {_reasons(dropped)}")
    if quarantined := statistics.totals("quarantined"):
        lines.append(f"quarantined: {_reasons(quarantined)}; see {folder / QUARANTINE}")
    lines.append("splits: " + ", ".join(f"{name} {metrics[f'{name}_tokens']:,} tokens" for name in SPLITS))
    empty = [name for name in SPLITS if not metrics[f"{name}_tokens"]]
    if empty and len(empty) < len(SPLITS):
        documents = statistics.total("documents")
        lines.append(
            f"note: no document is in the {' and '.join(empty)} split, of {documents:,} in all: a larger share in data.split gives it some"
        )
    lines.append(f"report: {folder / REPORT}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _cells(source: SourceStatistics) -> list[str]:
    per_byte = f"{source.tokens / source.bytes:.4f}" if source.bytes else "-"
    unknown = f"{source.unknown / source.tokens:.3%}" if source.tokens else "-"
    counts = (source.documents, sum(source.dropped.values()), source.rejected, source.tokens)
    return [*(f"{count:,}" for count in counts), decimal(source.bytes), per_byte, unknown]
