"""How `prepare` makes its folder: sources -> tokenizer -> parts -> pairs, quarantine, statistics, report. On one process of the world.

Whatever is interrupted is gone on with by the same call: a finished part is not made again, and the result is the same, byte for byte.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from largeformer.artifact import MANIFEST, Artifact, identity_hash, library_versions, write_atomically
from largeformer.config.schema import Recipe
from largeformer.data.cleaning.cleaner import Cleaner
from largeformer.data.cleaning.deduplication import MinHasher
from largeformer.data.preparation.encoding import Encoder, Task
from largeformer.data.preparation.merging import FINGERPRINTS, QUARANTINE
from largeformer.data.preparation.parts import finished, part_path
from largeformer.data.preparation.workers import available_cores, run_tasks
from largeformer.data.preparation.workspace import FILES, STATISTICS, Workspace
from largeformer.data.reading.corpus import Source, UnusableError, files_digest, open_sources, sample_documents
from largeformer.data.reading.units import Cursor, read_units, unit_bytes
from largeformer.data.tokenization.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer, missing_symbols, tokenizer_file
from largeformer.data.tokenization.training import sample_bytes, train_tokenizer
from largeformer.errors import BadInputError
from largeformer.stages.common.claim import CONFIG
from largeformer.stages.prepare_progress import ByteProgress
from largeformer.stages.prepare_report import REPORT, Results, table

logger = logging.getLogger(__name__)
_SAMPLE_FACTOR = 8  # text read for each byte that the tokenizer is trained on
_READ = ("tokenizer*", "*.bin", "*.idx")  # what later stages read
_ALONE_BYTES = 2**21  # less text than this is encoded before another process has started


@dataclass(frozen=True)
class Preparation:
    """One recipe's prepare in `folder`, which belongs to it."""

    recipe: Recipe
    folder: Path

    def run(self, *, append: bool) -> Artifact:
        """Prepare what is not prepared yet. `append`: add to the finished prepare that is there."""
        sources = self._open_sources()
        new, adds = self._begin(sources, append)
        there = Artifact.read(self.folder)
        identity = identity_hash(self.recipe.identity("prepare"))
        if adds and there is not None and there.identity == identity and not any(source.files for source in new):
            self.work.remove()
            return there
        with ByteProgress() as progress:
            tokenizer = self._tokenizer(new, progress)
            self._encode(new, tokenizer, progress)
            if files_digest(new) != (self.work.read_plan() or {}).get("files"):
                raise BadInputError("files of data.sources changed while they were read: run prepare again when nothing writes to them")
            progress.phase("writing the indexed datasets")
            results = Results(self.recipe, self.work, new, tokenizer)
            statistics, metrics = results.write()
        self.work.switch(lambda: (self.folder / MANIFEST).unlink(missing_ok=True))
        metrics["files"] = {path.name: path.stat().st_size for pattern in _READ for path in sorted(self.folder.glob(pattern))}
        artifact = Artifact("prepare", self.folder, identity, metrics=metrics, versions=library_versions(self._libraries)).write()
        self.work.remove()
        table(statistics, metrics, self.folder)
        return artifact

    @cached_property
    def work(self) -> Workspace:
        return Workspace(self.folder)

    @property
    def _libraries(self) -> tuple[str, ...]:
        return ("tokenizers" if self.recipe.tokenizer.type == "huggingface" else "sentencepiece", "megatron-core", "numpy")

    @property
    def _tokenizer_path(self) -> Path:
        return self.folder / tokenizer_file(self.recipe.tokenizer)

    def _open_sources(self) -> list[Source]:
        try:
            sources = open_sources(self.recipe.data)
        except UnusableError as error:
            if not (self.folder / MANIFEST).exists():
                rows = [{"file": item.file, "line": item.line, "reason": item.reason} for item in error.rejected]
                write_atomically(self.folder / QUARANTINE, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
            raise
        run = self.recipe.run.output_dir
        for source in sources:
            if source.pair is None and _holds(source, Path(run).resolve()):
                raise BadInputError(
                    f"data.sources path {source.path!r} holds run.output_dir {run}, whose files are no text: put it elsewhere"
                )
        return sources

    def _begin(self, sources: Sequence[Source], append: bool) -> tuple[list[Source], bool]:
        """The sources with those files only that are still to be prepared, and whether they are added to what is there.

        Goes on with an interrupted prepare where it fits; else begins anew.
        """
        begun = self.work.read_plan()
        interrupted = begun is not None and begun["adds"]
        adds = append or interrupted
        rows = set(self.work.base_files()) if interrupted else set(_lines(self.folder / FILES)) if append else set()
        new = [source.without(rows) for source in sources]
        plan = {
            "encoding": encoding_of(self.recipe),
            "files": files_digest(new),
            "text_keys": [source.text_key for source in new],
            "adds": adds,
            "given": self._given_sha256(),
        }
        if begun is not None and {**begun, "version": None} == {**json.loads(json.dumps(plan)), "version": None}:
            return new, adds
        if interrupted and not append:
            raise BadInputError(
                f"{self.folder} holds an interrupted prepare --append of other sources or files: run it again as it was begun, or move the "
                "folder away"
            )
        if begun is not None:
            logger.warning("an interrupted prepare left parts made %s: they are thrown away, and made anew", _difference(begun, plan))
        if not append:
            self._clear()
        self.work.begin(plan, self.folder if append else None)
        return new, adds

    def _clear(self) -> None:
        """Delete what another prepare may have left that did not finish."""
        for pattern in ("*.bin", "*.idx", "*.tmp", "tokenizer*", QUARANTINE, STATISTICS, FILES, REPORT):
            for leftover in self.folder.glob(pattern):
                leftover.unlink()
        shutil.rmtree(self.folder / FINGERPRINTS, ignore_errors=True)

    def _given_sha256(self) -> str | None:
        """Of the tokenizer's file that the recipe names, if it names one."""
        given = self.recipe.tokenizer.model
        if given is None:
            return None
        return load_tokenizer(Path(given).expanduser(), self.recipe.tokenizer).unique_identifiers["sha256"]

    def _tokenizer(self, sources: Sequence[Source], progress: ByteProgress) -> Tokenizer:
        config, path = self.recipe.tokenizer, self._tokenizer_path
        symbols = Cleaner(self.recipe.data.cleaning).symbols
        if not path.exists() and config.model is None:
            return self._train(sources, symbols, progress)
        if not path.exists():
            assert config.model is not None
            copy_tokenizer(Path(config.model).expanduser(), path)
        tokenizer = load_tokenizer(path, config)
        if missing := missing_symbols(tokenizer, [*config.user_symbols, *symbols]):
            raise BadInputError(
                f"tokenizer.model {config.model} does not keep {', '.join(missing)} as single ids, which tokenizer.user_symbols and "
                "data.cleaning need: leave them out, or let prepare train a tokenizer"
            )
        return tokenizer

    def _train(self, sources: Sequence[Source], symbols: Sequence[str], progress: ByteProgress) -> Tokenizer:
        texts = [source for source in sources if source.pair is None]
        if not texts:
            raise BadInputError("data.sources are Megatron pairs alone, which hold no text to train a tokenizer on: give tokenizer.model")
        limit = _SAMPLE_FACTOR * sample_bytes(self.recipe.tokenizer)
        progress.phase("reading text for the tokenizer", min(limit, sum(source.total_bytes for source in texts)))
        return train_tokenizer(self._cleaned_sample(texts, limit, progress), self.recipe.tokenizer, self._tokenizer_path, symbols)

    def _cleaned_sample(self, sources: Sequence[Source], limit: int, progress: ByteProgress) -> Iterator[str]:
        cleaner = Cleaner(self.recipe.data.cleaning)
        for document, size in sample_documents(sources, limit, self.recipe.data.max_document_bytes):
            cleaned = cleaner(document.text).text
            if cleaned is not None:
                yield cleaned
            progress.advance(size, size)
        progress.phase("training the tokenizer")

    def _encode(self, sources: Sequence[Source], tokenizer: Tokenizer, progress: ByteProgress) -> None:
        data = self.recipe.data
        deduplicate = data.deduplicate
        hasher = MinHasher(deduplicate.near) if deduplicate is not None and deduplicate.near is not None else None
        encoder = Encoder(tokenizer, Cleaner(data.cleaning), data.max_document_bytes, deduplicate is not None and deduplicate.exact, hasher)
        texts = [source for source in sources if source.pair is None and source.files]
        if not texts:
            return
        total = sum(source.total_bytes for source in texts)
        workers = (data.prepare_workers or available_cores()) if total > _ALONE_BYTES else 1
        progress.phase("encoding", total)
        for read, text in run_tasks(encoder, self._tasks(texts, progress), workers):
            progress.advance(read, text)

    def _tasks(self, sources: Sequence[Source], progress: ByteProgress) -> Iterator[Task]:
        """The units that have no part yet. What lies before the first gap is not even read."""
        for source in sources:
            folder = self.work.parts(source.name)
            number, last = finished(folder)
            start = last.cursor if last is not None else None
            if start is not None:
                progress.say(f"{source.name}: {number} parts are there, going on after them")
                progress.skip(_read_before(source, start))
            for unit in read_units(source.files, unit_bytes(source.total_bytes), self.recipe.data.max_document_bytes, start, number):
                if part_path(folder, unit.number).exists():
                    progress.skip(unit.input_bytes)
                else:
                    yield Task(unit, source.text_key, folder)


def encoding_of(recipe: Recipe) -> dict[str, Any]:
    """What the tokens of a text depend on, beside the text."""
    data = recipe.data.model_dump(mode="json", include={"cleaning", "deduplicate", "max_document_bytes"})
    return {"tokenizer": recipe.tokenizer.identity(), **data}


def check_base(recipe: Recipe, folder: Path) -> None:
    """Raise BadInputError where the finished prepare in `folder` cannot be added to under `recipe`."""
    try:
        before = Recipe.model_validate(yaml.safe_load((folder / CONFIG).read_text()))
    except (OSError, ValidationError, yaml.YAMLError) as error:
        raise BadInputError(f"{folder / CONFIG} cannot be read, so nothing can be added to {folder}: prepare anew with --fresh") from error
    if missing := [name for name in (STATISTICS, FILES) if not (folder / name).exists()]:
        raise BadInputError(f"{folder} has no {' and '.join(missing)}, by which to add to it: prepare anew with --fresh")
    problems = []
    old, new = encoding_of(before), encoding_of(recipe)
    for section, was, now in (("tokenizer", old.pop("tokenizer"), new.pop("tokenizer")), ("data", old, new)):
        problems += [
            f"{section}.{key} was {was.get(key)}, is {now[key]}: what is added must be made alike"
            for key in now
            if was.get(key) != now[key]
        ]
    were, are = ([f"{source.path} ({source.text_key})" for source in data.sources] for data in (before.data, recipe.data))
    if were != are[: len(were)]:
        problems.append(
            f"data.sources begin with {', '.join(are[: len(were)])}, in {folder} they are {', '.join(were)}: "
            "--append wants the old sources first, in their order, then the new ones"
        )
    if before.data.is_mock or recipe.data.is_mock:
        problems.append("data.sources path 'mock' makes random tokens, to which nothing can be added")
    if problems:
        raise BadInputError(problems)


def _difference(begun: dict[str, Any], plan: dict[str, Any]) -> str:
    if begun["encoding"] != plan["encoding"] or begun["given"] != plan["given"]:
        return "with another tokenizer, cleaning or deduplication"
    if begun["files"] == plan["files"] and begun.get("text_keys") != plan["text_keys"]:
        return "from other fields (text_key)"
    return "from other sources, or from files that have changed since"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _read_before(source: Source, cursor: Cursor) -> int:
    """Bytes of a source's files that lie before a cursor: of a compressed file all or nothing."""
    before = sum(file.fingerprint[0] for file in source.files[: cursor.file])
    inside = cursor.file < len(source.files) and not source.files[cursor.file].compression
    return before + (cursor.offset if inside else 0)


def _holds(source: Source, folder: Path) -> bool:
    """Whether the source is a folder, or a glob from one, that has `folder` in it, and files from there."""
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), Path(source.path).expanduser().parts)
    return folder not in Path(*plain).resolve().parents and any(folder in file.path.resolve().parents for file in source.files)
