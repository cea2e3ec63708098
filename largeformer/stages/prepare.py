"""`prepare`: text -> tokenizer -> indexed token ids, in `<output_dir>/prepare/`, by one process.

tokenizer.model          trained on a sample of the sources, or copied from `tokenizer.model`
0-<name>.bin/.idx ...    one pair for each source
quarantine.jsonl         what was rejected: file, line, reason
config.yaml              the recipe, resolved
manifest.json            last of all: prepare is finished
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from largeformer.artifact import Artifact, identity_hash, library_versions, read_status, write_atomically
from largeformer.config.schema import Recipe
from largeformer.data.indexed import SPLITS, Counts, IndexedWriter, open_indexed, parse_split, split_documents, split_tokens
from largeformer.data.text import Document, Rejected, documents, source_files
from largeformer.data.tokenizer import MockTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.claim import claim
from largeformer.stages.progress import ByteProgress
from largeformer.stages.world import reporting
from largeformer.training.signals import StopRequested, StopSignals

KIND = "prepare"
_TOKENIZER = "tokenizer.model"
_QUARANTINE = "quarantine.jsonl"
_LIBRARIES = ("sentencepiece", "megatron-core", "numpy")
_ENCODE_BYTES = 4 * 2**20
_CLOCK_SLACK_S = 2.0  # what the clocks of two machines may differ


def stage_folder(recipe: Recipe) -> Path:
    return Path(recipe.run.output_dir) / KIND


def prefixes(recipe: Recipe, folder: Path) -> list[tuple[Path, float]]:
    """Where each source's `.bin/.idx` pair is, and its weight."""
    return [(folder / _pair_name(i, source.path), source.weight) for i, source in enumerate(recipe.data.sources)]


def open_tokenizer(recipe: Recipe, folder: Path) -> Tokenizer | MockTokenizer:
    """The tokenizer in a prepare folder, checked against the recipe's vocabulary."""
    if recipe.data.is_mock:
        return MockTokenizer(recipe.tokenizer.vocab_size)
    return load_tokenizer(folder / _TOKENIZER, recipe.tokenizer.vocab_size)


def run(recipe: Recipe, *, fresh: bool = False) -> Artifact:
    """Prepare the recipe's data, or return what is there. On one process only; other ranks call `wait_or_load`.

    `fresh` sets the result of another recipe aside (`prepare.old-N`) instead of refusing to replace it. Raises BadInputError.
    """
    folder = stage_folder(recipe)
    identity = identity_hash(recipe.identity(KIND))
    with reporting(recipe, KIND), StopSignals.current().at_once():
        there = Artifact.read(folder)
        if there is not None and there.identity == identity:
            return there
        claim(folder, recipe, KIND, fresh)
        return _prepare(recipe, folder, identity)


def run_or_wait(recipe: Recipe, *, fresh: bool = False) -> Artifact:
    """`run` on rank 0 of the world that the launcher made, `wait_or_load` on the others."""
    return run(recipe, fresh=fresh) if discover(os.environ).is_main else wait_or_load(recipe)


def wait_or_load(recipe: Recipe, *, since: float | None = None, poll_seconds: float = 0.5, timeout: float | None = None) -> Artifact:
    """The prepare artifact, as soon as the rank that makes it has finished: without a collective, which would time out.

    A failure written before `since` (seconds since the epoch; by default about when this process started) is an earlier run's.
    timeout: seconds, None for ever. Raises BadInputError where prepare failed on the rank that runs it, TimeoutError.
    """
    folder = stage_folder(recipe)
    identity = identity_hash(recipe.identity(KIND))
    started = time.monotonic()
    since = since if since is not None else _process_start() - _CLOCK_SLACK_S
    while True:
        there = Artifact.read(folder)
        if there is not None and there.identity == identity:
            return there
        status = read_status(folder.parent) or {}
        if status.get("status") == "failed" and status.get("stage") == KIND and status.get("time", 0.0) >= since:
            raise BadInputError(f"prepare failed on the rank that runs it: {status.get('error', 'no reason given')}")
        if status.get("status") == "requeue" and status.get("stage") == KIND and status.get("time", 0.0) >= since:
            raise StopRequested(f"prepare was {status.get('reason')} on the rank that runs it")
        if timeout is not None and time.monotonic() - started > timeout:
            raise TimeoutError(
                f"no {folder / 'manifest.json'} after {timeout:g} s: is the rank that runs prepare alive, and the folder shared?"
            )
        time.sleep(poll_seconds)


def _process_start() -> float:
    """When this process began, in seconds since the epoch."""
    after_boot = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.time() - float(Path("/proc/uptime").read_text().split()[0]) + after_boot


def _prepare(recipe: Recipe, folder: Path, identity: str) -> Artifact:
    for pattern in ("*.bin", "*.idx", "*.tmp", _QUARANTINE, _TOKENIZER):  # An interrupted prepare may have left some.
        for leftover in folder.glob(pattern):
            leftover.unlink()
    metrics: dict[str, Any] = {}
    if not recipe.data.is_mock:
        parse_split(recipe.data.split)
        sources = [source.path for source in recipe.data.sources]
        _check_sources(sources, folder / _QUARANTINE)
        tokenizer = _make_tokenizer(recipe, folder, sources)
        metrics = _encode(recipe, folder, tokenizer)
    return Artifact(KIND, folder, identity, metrics=metrics, versions=library_versions(_LIBRARIES)).write()


def _check_sources(sources: Sequence[str], quarantine: Path) -> None:
    """Every source exists and holds at least one document; all that do not are reported at once."""
    problems: list[str] = []
    rejected: list[Rejected] = []
    for source in sources:
        try:
            source_files(source)
        except BadInputError as error:
            problems += error.problems
            continue
        unusable = _all_rejected(source)
        if unusable is not None:
            rejected += unusable
            example = f"; {len(unusable)} inputs were rejected, the first: {_place(unusable[0])}" if unusable else ", only blanks"
            problems.append(f"data.sources path {source!r} holds nothing usable{example}")
    if problems:
        write_atomically(quarantine, b"".join(_row(item) for item in rejected))
        raise BadInputError(problems)


def _all_rejected(source: str) -> list[Rejected] | None:
    """Everything in a source that holds no document, or None as soon as it is seen to hold one."""
    rejected = []
    for item in documents(source):
        if isinstance(item, Document):
            return None
        rejected.append(item)
    return rejected


def _make_tokenizer(recipe: Recipe, folder: Path, sources: Sequence[str]) -> Tokenizer:
    given = recipe.tokenizer.model
    path = folder / _TOKENIZER
    if given is not None:
        tokenizer = load_tokenizer(Path(given).expanduser(), recipe.tokenizer.vocab_size)
        write_atomically(path, Path(given).expanduser().read_bytes())
        return tokenizer
    with ByteProgress("reading text for the tokenizer", _total_bytes(sources)) as progress:
        texts = (item.text for source in sources for item in documents(source) if isinstance(item, Document))
        return train_tokenizer(progress.track(texts), recipe.tokenizer, path)


@dataclass
class _Tally:
    """What was read so far, over all sources."""

    rejected: list[Rejected] = field(default_factory=list)
    counts: list[Counts] = field(default_factory=list)

    def total(self, name: str) -> int:
        return sum(getattr(counts, name) for counts in self.counts)


def _encode(recipe: Recipe, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write every source's pair and the quarantine; returns the manifest's metrics."""
    paths = [source.path for source in recipe.data.sources]
    pairs = [prefix for prefix, _ in prefixes(recipe, folder)]
    tally = _Tally()
    with ByteProgress("encoding", _total_bytes(paths)) as progress:
        for path, prefix in zip(paths, pairs, strict=True):
            _encode_source(path, prefix, tokenizer, tally, progress)
    write_atomically(folder / _QUARANTINE, b"".join(_row(item) for item in tally.rejected))
    _check_quarantine(recipe.data.quarantine_threshold, tally, folder / _QUARANTINE)
    tokens, size = tally.total("tokens"), tally.total("bytes")
    return {
        "documents": tally.total("documents"),
        "tokens": tokens,
        "bytes": size,
        "tokens_per_byte": tokens / size,
        "rejected": len(tally.rejected),
        "unknown_rate": tally.total("unknown") / tokens,
        **_split_tokens(recipe, pairs),
        "sources": [{"name": prefix.name, **vars(counts)} for prefix, counts in zip(pairs, tally.counts, strict=True)],
    }


def _encode_source(path: str, prefix: Path, tokenizer: Tokenizer, tally: _Tally, progress: ByteProgress) -> None:
    with IndexedWriter(prefix, tokenizer.vocab_size, tokenizer.eod) as writer:
        for texts in progress.track_batches(_batches(_accepted(documents(path), tally.rejected))):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                writer.add(ids)
                writer.counts.bytes += len(text.encode("utf-8"))
                writer.counts.unknown += ids.count(tokenizer.unknown)
        tally.counts.append(writer.counts)


def _accepted(items: Iterable[Document | Rejected], rejected: list[Rejected]) -> Iterator[str]:
    for item in items:
        if isinstance(item, Document):
            yield item.text
        else:
            rejected.append(item)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in groups that keep all cores busy and memory bounded."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= _ENCODE_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _check_quarantine(threshold: float, tally: _Tally, path: Path) -> None:
    rejected = len(tally.rejected)
    inputs = rejected + tally.total("documents")
    if rejected > threshold * inputs:
        raise BadInputError(
            f"{rejected} of {inputs} inputs were rejected ({rejected / inputs:.2%}), data.quarantine_threshold allows {threshold:.2%}; "
            f"the first: {_place(tally.rejected[0])}. Mend what {path} lists, or raise the threshold"
        )


def _split_tokens(recipe: Recipe, pairs: Sequence[Path]) -> dict[str, int]:
    """Tokens of each split, over all sources."""
    tokens = dict.fromkeys(SPLITS, 0)
    for prefix in pairs:
        dataset = open_indexed(prefix, recipe.tokenizer.vocab_size)
        for name, part in split_documents(recipe.data.split, len(dataset)).items():
            tokens[name] += len(split_tokens(dataset, part))
    return {f"{name}_tokens": count for name, count in tokens.items()}


def _total_bytes(sources: Sequence[str]) -> int | None:
    """Bytes of text to expect; None where compression or JSON hides it."""
    files = [file for source in sources for file in source_files(source)]
    if any(file.suffix in (".gz", ".jsonl") for file in files):
        return None
    return sum(file.stat().st_size for file in files)


def _pair_name(index: int, source: str) -> str:
    """A file name for a source, told apart by its number."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", Path(source).name.split(".")[0]).strip("-")
    return f"{index}-{readable or 'text'}"


def _row(item: Rejected) -> bytes:
    return (json.dumps({"file": item.file, "line": item.line, "reason": item.reason}) + "\n").encode()


def _place(item: Rejected) -> str:
    return f"{item.file}:{item.line}: {item.reason}"
