"""What each model of a chain is worth beside the first one: measured after its stage, kept in its manifest, held to `quality.limits`.

RUN/<stage>/manifest.json   metrics.quality: size, loss and agreement over held-out text, latency by shape and threads
RUN/quality.json, .svg      all of them, and the exports, once the chain has ended; up to the stage that is beyond its limits where one is
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from largeformer.artifact import Artifact, identity_hash
from largeformer.checkpoint.manifest import checksum
from largeformer.config.chain import StageEntry, at_stage
from largeformer.config.quality import LimitsConfig, QualityConfig
from largeformer.config.schema import Recipe
from largeformer.errors import StageFailed
from largeformer.parallel.environment import discover
from largeformer.stages.common import prepared_data
from largeformer.stages.common.deployed import deployed
from largeformer.stages.common.weights import Source, find_source, inference_layout, named_model, shaped_like
from largeformer.stages.common.world import World, enter_world, reporting
from largeformer.stages.quality_report import write_report

if TYPE_CHECKING:
    from largeformer.compression.quantization.description import Description
    from largeformer.export.twin import CachedGPT
    from largeformer.parallel.batch import Batch

TRAINED, DERIVED = ("import", "pretrain"), ("distill", "prune", "quantize")
LARGEST_TIMED = 500_000_000
"""Parameters beyond which a model is not timed on the CPU of rank 0, which holds it whole for that."""


@dataclass(frozen=True)
class _Model:
    """A stage's model. `recipe`: shaped like it, at the world's layout."""

    name: str
    recipe: Recipe
    source: Source

    @property
    def parameters(self) -> int:
        from largeformer.models.flops import parameter_count

        return parameter_count(self.recipe.model, self.recipe.tokenizer.vocab_size)

    @property
    def identity(self) -> str:
        """Of its stage; where that has not finished, of its files."""
        artifact = Artifact.read(self.source.checkpoint.parent.parent)
        return checksum(self.source.checkpoint) if artifact is None else artifact.identity

    @cached_property
    def quantization(self) -> Description | None:
        """What becomes of its weights where they are exported."""
        from largeformer.compression.quantization.description import read_description

        return read_description(self.source.checkpoint)

    @property
    def bytes(self) -> int:
        """Of the weights, as integers where they are quantized."""
        from largeformer.export.streaming import StoredTensors
        from largeformer.models.hf_mapping import rows, shapes

        stored = StoredTensors.of_checkpoint(self.source.checkpoint)
        item = stored.dtype(stored.names[0]).itemsize
        total = item * self.parameters
        if self.quantization is None:
            return total
        model = self.recipe.model
        sizes = shapes(rows(model, "llama"), model, self.recipe.tokenizer.vocab_size)
        for name, given in self.quantization.given.items():
            saved = math.prod(sizes[f"{name}.weight"]) * (8 * item - self.quantization.scheme.bits) // 8
            zero_points = given.zero_point.numel() * self.quantization.scheme.bits // 8 if given.zero_point is not None else 0
            total += item * (given.scale.numel() + (given.input_scale is not None)) + zero_points - saved
        return total


def is_judged(recipe: Recipe) -> bool:
    """Whether the recipe's chain makes one model of another: then all of them are compared with the first."""
    return any(entry.stage in DERIVED for entry in recipe.run.stages) and first_model(recipe) is not None


def assess(recipe: Recipe, entry: StageEntry) -> None:
    """Measure the model that `entry` has left beside the chain's first one, say what was found, and add it to the manifest, unless it
    stands there. Raises StageFailed where it is beyond `quality.limits`: the stage counts as unfinished then, and the report of the
    chain so far has its figures."""
    first = inference_layout(recipe, discover(os.environ).world_size)
    with reporting(recipe, entry.name), enter_world(first, training=False) as world:
        folder = first_model(recipe)
        assert folder is not None, "the chain is judged"
        model, reference = _find(first, Path(recipe.run.output_dir) / entry.name), _find(first, folder)
        artifact = Artifact.read(Path(recipe.run.output_dir) / entry.name)
        assert artifact is not None, "the stage has just finished"
        settings = recipe.quality.model_dump(mode="json", exclude={"limits"})
        text = world.from_main(lambda: prepared_data.content(reference.source.prepared))
        key = identity_hash({**settings, "reference": reference.identity, "text": text})
        held = artifact.metrics.get("quality", {})
        is_new = held.get("key") != key
        found = {"key": key, **_measure(model, reference, world, recipe.quality)} if is_new else held
        wrong = failures(found, recipe.quality.limits.get(entry.name, LimitsConfig()))
        found = {**found, "passed": not wrong}
        judged = replace(artifact, metrics={**artifact.metrics, "quality": found})

        def record() -> None:
            if is_new:
                print(in_a_line(entry.name, found), flush=True)
            if wrong:
                artifact.withdraw()
                write_report(recipe, failed=judged)
            elif found != held:
                judged.write()

        world.from_main(record)
        if wrong:
            raise StageFailed([f"{entry.name}: {problem}" for problem in wrong])


def in_a_line(name: str, found: Mapping[str, Any]) -> str:
    """The figures of the model of the stage `name` for the console: `found` is `metrics.quality` of its manifest."""
    beside = f" ({found['perplexity_increase']:+.2%} beside {found['reference']})" if name != found["reference"] else ""
    return (
        f"{name}: perplexity {found['perplexity']:.4f}{beside}, {found['bits_per_byte']:.4f} bits/byte, KL {found['kl']:.2e}, "
        f"same likeliest token {found['top1_agreement']:.2%} (test split, {found['tokens']:,} tokens)"
    )


def first_model(recipe: Recipe) -> Path | None:
    """Where the model comes from that the others are compared with: the chain's first stage that trains one, the import or the
    pretraining that lies in its run already, or the teacher of another run. None where there is none of them."""
    run = Path(recipe.run.output_dir)
    trained = [run / entry.name for entry in recipe.run.stages if entry.stage in TRAINED]
    teachers = [named_model(recipe, teacher) for entry in recipe.run.stages if (teacher := at_stage(recipe, entry).distill.teacher)]
    there = [folder for folder in (run / name for name in TRAINED) if Artifact.read(folder) is not None]
    return next(iter((*trained, *there, *(folder for folder in teachers if folder.is_dir()))), None)


def failures(found: Mapping[str, Any], limits: LimitsConfig) -> list[str]:
    """Where a model is beyond its limits; a figure that is NaN is beyond any, and a loss that is not finite is so without limits."""
    told = [] if math.isfinite(found["loss"]) else [f"the loss is {found['loss']}: weights or activations are not finite"]
    for name, limit in limits.model_dump(exclude_none=True).items():
        value = found[name.partition("_")[2]]
        if not (value >= limit if name.startswith("min_") else value <= limit):
            told.append(f"{name.partition('_')[2]} is {value:.4g}, quality.limits allow {limit:g} ({name})")
    return told


def _find(recipe: Recipe, folder: Path) -> _Model:
    source = find_source(recipe, folder)
    return _Model(source.checkpoint.absolute().parent.parent.name, shaped_like(recipe, source), source)


def _measure(model: _Model, reference: _Model, world: World, settings: QualityConfig) -> dict[str, Any]:
    """Collective; latency is rank 0's."""
    from largeformer.evaluation.quality import compare

    tokenizer = prepared_data.open_tokenizer(reference.recipe, reference.source.prepared.path)
    seq_length = min(one.recipe.model.seq_length for one in (model, reference))
    windows = _windows(reference, world, settings.tokens, seq_length)
    theirs, ours = (deployed(_exact(one), world, one.source.checkpoint) for one in (reference, model))
    with theirs as reference_chunk, ours as chunk:
        found = compare(chunk, reference_chunk, windows, world.groups, tokenizer.piece_bytes)
    about = {
        "parameters": model.parameters,
        "weight_bytes": model.bytes,
        "reference": reference.name,
        "text": reference.source.prepared.identity,
        "seq_length": seq_length,
    }
    return {**about, **found.metrics(), "latency": world.from_main(lambda: _latency(model, reference, settings, seq_length))}


def _exact(model: _Model) -> Recipe:
    return model.recipe.model_copy(update={"train": model.recipe.train.model_copy(update={"precision": "fp32"})})


def _windows(model: _Model, world: World, tokens: int, seq_length: int) -> Iterator[Batch]:
    """Of the test split, as clients of exports read it: documents follow each other, whatever the recipe's switches for training."""
    from largeformer.data.loader import Reading, evaluation_windows
    from largeformer.data.splits import held_out_streams

    recipe, folder = model.recipe, model.source.prepared.path
    tokenizer = prepared_data.open_tokenizer(recipe, folder)
    streams = held_out_streams(recipe.data, prepared_data.prefixes(recipe, folder), tokenizer, "test", recipe.run.seed)
    at, layout = world.groups.coordinates, world.groups.layout
    reading = Reading(recipe.train.micro_batch_size, at.data, layout.data)
    step = seq_length * reading.micro_batch_size * layout.data
    return islice(evaluation_windows(streams, seq_length, reading, tokenizer.eod), -(-tokens // step))


def _latency(model: _Model, reference: _Model, settings: QualityConfig, seq_length: int) -> list[dict[str, Any]]:
    """Both as plain PyTorch in float32 on this process's CPU, taking turns; empty for models too large for that."""
    import torch

    if max(model.parameters, reference.parameters) > LARGEST_TIMED:
        return []
    twins = {name: _twin(one) for name, one in {"model": model, "reference": reference}.items()}
    steps = {name: _torch_step(twin, one.recipe) for (name, twin), one in zip(twins.items(), (model, reference), strict=True)}
    before = torch.get_num_threads()
    try:
        rows = list(timed(steps, settings, seq_length, torch.set_num_threads))
        return [{**row, "tokens_per_s": 1000 * row["tokens"] / row["model_ms"]} for row in rows]
    finally:
        torch.set_num_threads(before)


Step = Callable[[int, int, int], Callable[[], object]]
"""rows, tokens of a call, tokens in the cache -> what makes the call."""


def timed(
    steps: Mapping[str, Step], settings: QualityConfig, seq_length: int, use_threads: Callable[[int], object]
) -> Iterator[dict[str, Any]]:
    """One row for each shape and number of threads: the milliseconds of each contestant, and how many tokens they are for."""
    from largeformer.evaluation.quality import fastest

    for threads in settings.threads:
        use_threads(threads)
        for rows, tokens in settings.shapes:
            tokens = min(tokens, seq_length)
            past = seq_length // 2 if tokens == 1 else 0
            seconds = fastest({name: step(rows, tokens, past) for name, step in steps.items()}, settings.rounds)
            yield {
                "shape": f"{rows}x{tokens}" + (f" after {past}" if past else ""),
                "threads": threads,
                "tokens": rows * tokens,
                **{f"{name}_ms": 1000 * value for name, value in seconds.items()},
            }


def _twin(model: _Model) -> CachedGPT:
    from largeformer.export.onnx import plain_twin
    from largeformer.export.streaming import StoredTensors
    from largeformer.export.twin import CachedGPT

    shape, vocab_size = model.recipe.model, model.recipe.tokenizer.vocab_size
    return CachedGPT(plain_twin(StoredTensors.of_checkpoint(model.source.checkpoint), shape, vocab_size), shape).eval()


def _torch_step(twin: CachedGPT, recipe: Recipe) -> Step:
    import torch

    model = recipe.model

    def prepared(rows: int, tokens: int, past: int) -> Callable[[], object]:
        cache = [(torch.zeros(rows, model.query_groups, past, model.head_dim),) * 2 for _ in range(model.num_layers)]
        ids, mask = torch.ones(rows, tokens, dtype=torch.int64), torch.ones(rows, past + tokens, dtype=torch.int64)
        positions = torch.arange(past, past + tokens).expand(rows, -1)

        def call() -> object:
            with torch.inference_mode():
                return twin(ids, mask, positions, cache) if past else twin.plain(ids)

        return call

    return prepared
