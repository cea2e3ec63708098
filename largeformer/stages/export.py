"""`export`: a checkpoint in the formats that people's tools open, each opened again and compared, in `<output_dir>/export/`.

    hf/ hf-int8/ onnx/ ...   one folder for each of `export.formats`
    config.yaml              the recipe, resolved
    manifest.json            last of all: every format has passed its gate

Formats are written into `<format>.unfinished` and get their names together at the end. Those that fail are left so, to be looked at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from largeformer.artifact import (
    MANIFEST,
    Artifact,
    identity_hash,
    library_versions,
    read_status,
    size_problems,
    sync_folder,
    write_atomically,
)
from largeformer.config.chain import StageEntry, entry_named
from largeformer.config.export import ExportFormat
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError, StageFailed
from largeformer.parallel.environment import discover
from largeformer.stages.common import prepared_data
from largeformer.stages.common.claim import CONFIG, identity_in, set_aside
from largeformer.stages.common.inputs import Input, input_of, record
from largeformer.stages.common.sparse import is_sparse
from largeformer.stages.common.weights import Source, inference_layout
from largeformer.stages.common.world import enter_world, reporting
from largeformer.stages.export_source import onnx_latency, reference, sample_texts
from largeformer.stages.quality_report import weight_bytes
from largeformer.training.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from largeformer.export.formats import Job
    from largeformer.export.gate import Reference

STAGE = "export"
_LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "compressed-tensors", "onnx", "onnxscript", "onnxruntime")
_UNFINISHED = ".unfinished"
_SCRATCH = f"reference{_UNFINISHED}"
_SAME_TEXTS = 0.99  # of the held-out text; SentencePiece adds its scores in float32, where two cuts may come out equal
_POLL_S = 0.5
_CLOCK_SLACK_S = 2.0


@dataclass(frozen=True)
class _Plan:
    """What is to be exported, found and checked by rank 0."""

    given: Input
    parents: dict[str, str]
    identity: str
    formats: tuple[str, ...]
    done: Artifact | None


def run(recipe: Recipe, source: Path | None = None, *, fresh: bool = False, entry: StageEntry | None = None) -> Artifact:
    """Export the checkpoint at `source` (default: the newest stage of the recipe's own run). Every rank computes the source's answers;
    then rank 0 works and the others wait. Raises BadInputError, or StageFailed where an export is too far from its source."""
    world_size = discover(os.environ).world_size
    entry = entry or entry_named(recipe, STAGE)
    with reporting(recipe, entry.name), StopSignals.current().at_once():
        started = time.time() - _CLOCK_SLACK_S
        first = inference_layout(recipe, world_size)
        with enter_world(first, training=False) as world:
            given = input_of(first, entry, source)
            plan = world.from_main(lambda: _plan(given, fresh))
            if plan.done is not None:
                return plan.done
            expected = reference(plan.given.recipe, world.regroup(plan.given.recipe), plan.given.source, plan.given.folder / _SCRATCH)
        return _export(plan, expected) if expected is not None else _wait(plan, started)


def _plan(given: Input, fresh: bool) -> _Plan:
    from largeformer.export.formats import chosen

    recipe, origin = given.recipe, given.origin()
    identity, done = identity_hash(origin), Artifact.read(given.folder)
    if done is not None and done.identity == identity:
        damage = [problem for name, made in done.metrics["formats"].items() for problem in size_problems(done.path / name, made["bytes"])]
        if not damage:
            return _Plan(given, origin["parents"], identity, (), done)
        print(f"the export is damaged ({'; '.join(damage)}): it is set aside, and made anew", flush=True)
        fresh = True
    formats = chosen(_job(recipe, given.source))
    _claim(given.folder, recipe, fresh)
    return _Plan(given, origin["parents"], identity, tuple(formats), None)


def _claim(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """Make `folder` this export's. What an unfinished one left is removed; anything else is in the way, unless `fresh` sets it aside."""
    there = list(folder.iterdir()) if folder.is_dir() else []
    left = [path for path in there if path.suffix == _UNFINISHED or (path.name in get_args(ExportFormat) and _not_finished(folder, recipe))]
    foreign = sorted(path.name for path in there if path not in left and path.name != CONFIG)
    if foreign and not fresh:
        named = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise BadInputError(
            f"the export folder {folder} is not empty ({named}) and not the result of this recipe and checkpoint: choose another "
            "run.output_dir, or pass --fresh to set it aside"
        )
    if foreign:
        set_aside(folder)
    for path in left if not foreign else ():
        shutil.rmtree(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CONFIG, recipe_yaml(recipe).encode())


def _not_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether this recipe's export was stopped there after formats had got their names, and before the manifest."""
    return not (folder / MANIFEST).exists() and identity_in(folder, STAGE) == recipe.identity(STAGE)


def _job(recipe: Recipe, source: Source) -> Job:
    from largeformer.compression.quantization.description import read_description
    from largeformer.export.formats import Job
    from largeformer.export.huggingface import SpecialIds
    from largeformer.export.streaming import StoredTensors

    tokenizer = prepared_data.open_tokenizer(recipe, source.prepared.path)
    return Job(
        source=StoredTensors.of_checkpoint(source.checkpoint),
        model=recipe.model,
        tokens=recipe.tokenizer,
        config=recipe.export,
        ids=SpecialIds(
            eos=tokenizer.eod,
            pad=tokenizer.pad if tokenizer.pad >= 0 else None,
            ends=tuple(prepared_data.answer_ends(recipe, source.prepared.path)),
        ),
        tokenizer=None if recipe.data.is_mock else prepared_data.tokenizer_path(recipe, source.prepared.path),
        recipe=recipe_yaml(recipe),
        quantized=read_description(source.checkpoint),
    )


def _export(plan: _Plan, expected: Reference) -> Artifact:
    from largeformer.models.flops import parameter_count

    job = _job(plan.given.recipe, plan.given.source)
    texts = [] if plan.given.recipe.data.is_mock else sample_texts(plan.given.recipe, plan.given.source)
    parameters = parameter_count(plan.given.recipe.model, plan.given.recipe.tokenizer.vocab_size)
    sparsity = _sparsity(job) if is_sparse(plan.given.source.checkpoint) else {}
    made, wrong = {}, []
    for name in plan.formats:
        target = plan.given.folder / f"{name}{_UNFINISHED}"
        target.mkdir()
        print(f"writing {name}", flush=True)
        made[name], problems = _write_and_compare(name, job, target, expected, texts, sparse=bool(sparsity))
        wrong += [f"{name}: {problem}" for problem in problems]
        (target / "README.md").write_text(_card(plan, name, parameters, made[name]))
        _print(name, made[name])
    if wrong:
        kept = ", ".join(f"{name}{_UNFINISHED}" for name in plan.formats)
        raise StageFailed([*wrong, f"nothing was exported; what was written lies in {plan.given.folder} for you to look at ({kept})"])
    metrics = {"checkpoint": plan.given.source.checkpoint.name, "parameters": parameters, "formats": made, **sparsity}
    if "onnx" in plan.formats:
        files = plan.given.folder / f"onnx{_UNFINISHED}"
        metrics["latency"] = onnx_latency(files, plan.given.recipe.quality, plan.given.recipe.model.seq_length)
    for name in plan.formats:
        (plan.given.folder / f"{name}{_UNFINISHED}").rename(plan.given.folder / name)
    sync_folder(plan.given.folder)
    shutil.rmtree(plan.given.folder / _SCRATCH)
    artifact = Artifact(STAGE, plan.given.folder, plan.identity, plan.parents, metrics, library_versions(_LIBRARIES)).write()
    record(plan.given, artifact)
    return artifact


def _sparsity(job: Job) -> dict[str, Any]:
    """What the manifest says of a pruned source's zeros, as `prune` does; nothing where there are none."""
    from largeformer.compression.pruning.sparsity import has_zeros, sparsity_metrics

    return {"sparsity": sparsity_metrics(job.source)} if has_zeros(job.source) else {}


def _zeros_kept(name: str, job: Job, target: Path) -> tuple[dict[str, Any], list[str]]:
    """How many weights of linear layers are 0 in each file, and where one of the source's zeros is not."""
    from largeformer.compression.pruning.sparsity import assert_zeros_kept
    from largeformer.export.formats import FORMATS

    figures, problems = {}, []
    for file, weights in FORMATS[name].written(job, target):  # type: ignore[index]
        try:
            figures[file] = asdict(assert_zeros_kept(job.source, weights))
        except StageFailed as lost:
            problems += [f"{file}: {problem}" for problem in lost.problems]
    return figures, problems


def _write_and_compare(
    name: str, job: Job, target: Path, expected: Reference, texts: list[str], sparse: bool
) -> tuple[dict[str, Any], list[str]]:
    """The figures of one format for the manifest, and where it is beyond a threshold or has lost a zero."""
    from largeformer.export.formats import FORMATS
    from largeformer.export.gate import compare, failures

    form = FORMATS[name]  # type: ignore[index]
    form.write(job, target)
    figures: dict[str, Any] = {"bytes": {path.name: path.stat().st_size for path in sorted(target.iterdir())}, "parity": {}}
    problems: list[str] = []
    if sparse:
        figures["sparsity"], problems = _zeros_kept(name, job, target)
    for opened in form.opened(job, target):
        found = compare(expected, opened.client)
        about = dict(opened.about)
        problems += [
            f"{opened.name}: {text}" for text in [*about.pop("wrong", []), *failures(found, opened.thresholds, job.config.thresholds)]
        ]
        figures["parity"][opened.name] = _storable({**found.metrics(), **about})
        del opened
    if texts and "transformers" in form.needs:
        same = _same_ids(target, job, texts)
        figures["tokenizer_agreement"] = same
        if same < _SAME_TEXTS:
            problems.append(f"the tokenizer gives other ids for {1 - same:.2%} of the held-out text")
    write_atomically(target / "parity.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures, problems


def _same_ids(target: Path, job: Job, texts: list[str]) -> float:
    """The share of the text, in characters, for which the exported tokenizer gives the same ids as ours."""
    from largeformer.data.tokenization.tokenizer import load_tokenizer
    from largeformer.export.clients import tokenizer_ids

    assert job.tokenizer is not None
    ours = load_tokenizer(job.tokenizer, job.tokens)
    same = sum(len(text) for text, ids in zip(texts, tokenizer_ids(target, texts), strict=True) if ours.encode(text) == ids)
    return same / sum(map(len, texts))


def _storable(figures: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity and no NaN."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}


def _card(plan: _Plan, name: str, parameters: int, figures: Mapping[str, Any]) -> str:
    from largeformer.export.card import model_card

    return model_card(plan.given.recipe.run.name, name, plan.given.recipe.model, parameters, list(_lineage(plan)), figures["parity"])


def _lineage(plan: _Plan) -> Iterator[Any]:
    """The stages that led to the checkpoint, oldest first, as far as their manifests lie beside it."""
    from largeformer.export.card import Ancestor

    run = plan.given.source.checkpoint.absolute().parent.parent.parent
    held = [artifact for artifact in map(Artifact.read, sorted(run.iterdir())) if artifact is not None]
    by_identity = {artifact.identity: artifact for artifact in [plan.given.source.prepared, *held]}
    order: list[Artifact] = []

    def visit(identity: str) -> None:
        artifact = by_identity.get(identity)
        if artifact is not None and artifact not in order:
            for parent in artifact.parents.values():
                visit(parent)
            order.append(artifact)

    for identity in plan.parents.values():
        visit(identity)
    return (Ancestor(artifact.kind, artifact.identity, artifact.metrics) for artifact in order)


def _print(name: str, figures: Mapping[str, Any]) -> None:
    for file, found in figures["parity"].items():
        size = weight_bytes(figures["bytes"], file)
        shown = {key: "beyond all numbers" if found[key] is None else found[key] for key in ("perplexity", "kl", "max_logit_difference")}
        numbers = "  ".join(
            f"{key.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
        )
        print(f"    {name}/{file}: {size / 1e6:.1f} MB  {numbers}  same likeliest token {found['top1_agreement']:.2%}", flush=True)


def _wait(plan: _Plan, since: float) -> Artifact:
    """The artifact, as soon as rank 0 has finished: without a collective, which would time out. Raises BadInputError where it failed,
    StopRequested where it was stopped."""
    while True:
        there = Artifact.read(plan.given.folder)
        if there is not None and there.identity == plan.identity:
            return replace(there)
        status = read_status(plan.given.folder.parent) or {}
        if status.get("stage") == plan.given.entry.name and status.get("time", 0.0) >= since:
            if status["status"] == "failed":
                raise BadInputError(f"export failed on rank 0: {status.get('error', 'no reason given')}")
            if status["status"] == "requeue":
                raise StopRequested(f"export was {status.get('reason')} on rank 0")
        time.sleep(_POLL_S)
