"""Loss, perplexity and bits per byte of a checkpoint on held-out text, every token predicted once; and a sample of its text.

RUN/evaluate/manifest.json   the figures and the sample, of one model: those of another are printed, and not written over them
RUN/evaluate/config.yaml     the recipe, resolved
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from largeformer.artifact import Artifact, identity_hash, library_versions, write_atomically
from largeformer.config.chain import StageEntry, entry_named
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.errors import StageFailed
from largeformer.parallel.environment import discover
from largeformer.stages.common import prepared_data
from largeformer.stages.common.claim import CONFIG
from largeformer.stages.common.deployed import deployed, is_quantized
from largeformer.stages.common.held_out import held_out_loss
from largeformer.stages.common.inputs import Input, input_of, record
from largeformer.stages.common.weights import Source, inference_layout, load_model, on_this_world, without_virtual_stages
from largeformer.stages.common.world import World, enter_world, reporting
from largeformer.stages.generate import continue_prompt
from largeformer.training.signals import StopSignals

if TYPE_CHECKING:
    from largeformer.evaluation.perplexity import LossTotal

STAGE = "evaluate"
SPLIT: Final = "test"


def run(recipe: Recipe, source: Path | None = None, *, again: bool = True, entry: StageEntry | None = None) -> Artifact:
    """Evaluate the checkpoint at `source` (default: of the stage before this one in the recipe's own run) on its run's test split.

    The result is kept as an artifact in the recipe's run folder; without `again`, one that is there for this checkpoint is returned. Where
    `source` names another model than the one whose figures are kept there, they stay, and those of `source` are printed and returned.
    Raises StageFailed where the loss is not finite.
    """
    recipe = without_virtual_stages(on_this_world(recipe, discover(os.environ).world_size))
    # As a command it may look at a run that is still training, whose status it leaves alone.
    told = reporting(recipe, entry.name) if entry is not None else contextlib.nullcontext()
    with told, StopSignals.current().at_once(), enter_world(recipe, training=False) as world:
        given = input_of(recipe, entry or entry_named(recipe, STAGE), source)
        origin = _origin(given)
        there = world.from_main(lambda: Artifact.read(given.folder))
        if not again and there is not None and there.identity == identity_hash(origin):
            return there
        recipe, found = given.recipe, given.source
        sampling = inference_layout(recipe, world.info.world_size)
        total = _loss(recipe, sampling, world, found)
        if not math.isfinite(total.loss):
            raise StageFailed(
                [f"the loss of {found.checkpoint.name} on the {SPLIT} split is {total.loss}: weights or activations are not finite"]
            )
        prompt = _prompt(recipe, found)
        text = continue_prompt(sampling, world.regroup(sampling), found, prompt, recipe.generate)
        artifact = _artifact(given, origin, total, prompt + text)
        if world.info.is_main:
            _print(found, total, prompt, text)
            if source is not None and there is not None and _is_of_another(there, artifact, given):
                print(f"not written: {given.folder} holds the figures of another model; without --from they are made anew")
            else:
                _keep(given, artifact)
    return artifact


def _origin(given: Input) -> dict[str, Any]:
    """What makes the result what it is: the sample depends on `generate`."""
    return {**given.origin(), "generate": given.recipe.generate.model_dump(mode="json")}


def _is_of_another(there: Artifact, artifact: Artifact, given: Input) -> bool:
    """Whether the artifact that is there has the figures of another model. Where no finished stage made it, its weights alone tell."""
    if given.made_by is None:
        return there.identity != artifact.identity
    return there.parents != artifact.parents or there.metrics.get("checkpoint") != artifact.metrics["checkpoint"]


def _keep(given: Input, artifact: Artifact) -> None:
    """Into the stage's folder, and W&B where the recipe wants it. On rank 0 only."""
    given.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(given.folder / CONFIG, recipe_yaml(given.recipe).encode())
    artifact.write()
    record(given, artifact)


def _loss(recipe: Recipe, flat: Recipe, world: World, source: Source) -> LossTotal:
    """At the recipe's layout; of a quantized model, as its integers compute, at the one without a pipeline. Collective."""
    if not is_quantized(source.checkpoint):
        return held_out_loss(recipe, world, source, load_model(recipe, world, source.checkpoint), SPLIT)
    world = world.regroup(flat)
    with deployed(flat, world, source.checkpoint) as chunk:
        return held_out_loss(flat, world, source, [chunk], SPLIT)


def _prompt(recipe: Recipe, source: Source) -> str:
    """The beginning of the test split: text that the model has not seen."""
    from largeformer.data.splits import held_out_streams

    tokenizer = prepared_data.open_tokenizer(recipe, source.prepared.path)
    stream, *_ = held_out_streams(recipe.data, prepared_data.prefixes(recipe, source.prepared.path), tokenizer, SPLIT, recipe.run.seed)
    return tokenizer.decode(stream[: min(24, recipe.model.seq_length // 2)].tolist())


def _artifact(given: Input, origin: dict[str, Any], total: LossTotal, sample: str) -> Artifact:
    figures = {"perplexity": total.perplexity, "bits_per_byte": total.bits_per_byte}
    metrics = {
        "split": SPLIT,
        "checkpoint": given.source.checkpoint.name,
        "loss": total.loss,
        **{name: value if math.isfinite(value) else None for name, value in figures.items()},  # JSON has no infinity
        **asdict(total),
        "sample": sample,
    }
    versions = library_versions(("largeformer", "torch", "megatron-core"))
    return Artifact(STAGE, given.folder, identity_hash(origin), origin["parents"], metrics, versions)


def _print(source: Source, total: LossTotal, prompt: str, text: str) -> None:
    print(
        f"{source.checkpoint.name} on the {SPLIT} split: loss {total.loss:.4f}  perplexity {total.perplexity:.2f}  "
        f"{total.bits_per_byte:.4f} bits/byte  ({total.tokens:,} tokens, {total.bytes:,} bytes, each counted once)"
    )
    print("a sample, the prompt from held-out text between the marks:")
    for line in f">>>{prompt}<<<{text}".splitlines():
        print(f"    {line}")
