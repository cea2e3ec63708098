"""What `export` compares with: the source model's own answers over held-out text. Collective."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from largeformer.config.quality import QualityConfig
from largeformer.config.schema import GenerateConfig, Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data
from largeformer.stages.common.weights import Source, load_model
from largeformer.stages.quality import Step, timed

if TYPE_CHECKING:
    from largeformer.export.gate import Reference
    from largeformer.parallel.batch import Batch
    from largeformer.stages.common.world import World

SPLIT: Final = "test"


def reference(recipe: Recipe, world: World, source: Source, folder: Path) -> Reference | None:
    """The model's logits in float32 over the beginning of the held-out text; None on ranks other than 0.
    Collective.

    The logits lie in `folder`, which is made. `recipe` is at an inference layout, which is the world's.
    """
    import torch

    from largeformer.evaluation.generation import generate
    from largeformer.export.gate import GENERATED, Reference

    exact = recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": "fp32"})})
    (model,) = load_model(exact, world, source.checkpoint)
    batches = list(_windows(recipe, source))
    vocab_size = recipe.tokenizer.vocab_size
    shape = (len(batches), batches[0].tokens.shape[1], vocab_size)
    file = folder / "logits.npy"
    world.from_main(lambda: _allocate(file, shape))
    kept = np.lib.format.open_memmap(file, mode="r+") if world.info.is_main else None
    with torch.no_grad():
        for index, batch in enumerate(batches):
            here = batch.to(world.device)
            logits = model(here.tokens, here.position_ids, None, runtime_gather_output=True)
            if kept is not None:
                kept[index] = logits[0, :, :vocab_size].float().cpu().numpy()
    length = min(GENERATED, shape[1] // 2)
    prompt = batches[0].tokens[0, : min(length, int(batches[0].loss_mask[0].sum()))].tolist()
    greedy = GenerateConfig(max_new_tokens=length, temperature=0.0)
    # No id ends it: past the end of a document the comparison goes on.
    (continuation,) = generate([model], world.groups, [prompt], greedy, -1, world.device)
    if kept is None:
        return None
    kept.flush()
    tokens, labels, counted = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "labels", "loss_mask"))
    return Reference(tokens, labels, counted > 0, file, prompt, continuation)


def _allocate(file: Path, shape: tuple[int, ...]) -> None:
    """A file for float32 of this shape, all of whose blocks there are: writing to one that a full disk has not ends the process. Raises
    BadInputError."""
    file.parent.mkdir()
    try:
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        with file.open("r+b") as whole:
            os.posix_fallocate(whole.fileno(), 0, file.stat().st_size)
    except OSError as error:
        shutil.rmtree(file.parent, ignore_errors=True)
        size = f"{4 * math.prod(shape) / 1e6:,.0f} MB"
        raise BadInputError(
            f"{size} for logits cannot be had in {file.parent} ({error}): free its disk, or lower export.gate_tokens"
        ) from None


def _windows(recipe: Recipe, source: Source) -> Iterator[Batch]:
    """The first windows of the held-out text, `export.gate_tokens` in all or as many as there are."""
    from largeformer.data.loader import Reading, evaluation_windows
    from largeformer.data.splits import held_out_streams

    folder = source.prepared.path
    tokenizer = prepared_data.open_tokenizer(recipe, folder)
    streams = held_out_streams(recipe.data, prepared_data.prefixes(recipe, folder), tokenizer, SPLIT, recipe.run.seed)
    length = min(recipe.model.seq_length, recipe.export.gate_tokens)
    count = -(-recipe.export.gate_tokens // length)
    return islice(evaluation_windows(streams, length, Reading(micro_batch_size=1), tokenizer.eod), count)


def sample_texts(recipe: Recipe, source: Source) -> list[str]:
    """The same text, as text, one piece for each line: for tokenizers to be compared."""
    tokenizer = prepared_data.open_tokenizer(recipe, source.prepared.path)
    windows = [tokenizer.decode(batch.labels[0][batch.loss_mask[0] > 0].tolist()) for batch in _windows(recipe, source)]
    return [line for window in windows for line in window.splitlines(keepends=True)]


def onnx_latency(folder: Path, settings: QualityConfig, seq_length: int) -> dict[str, list[dict[str, Any]]]:
    """How fast onnxruntime runs the files of an ONNX export, which take turns: by `onnx/<file>` a row for each shape and threads."""
    from largeformer.export.clients import OnnxClient

    def step(client: OnnxClient) -> Step:
        def prepared(rows: int, tokens: int, past: int) -> Callable[[], object]:
            ids = np.ones((rows, tokens), dtype=np.int64)
            cache = client.advance(np.ones((rows, past), dtype=np.int64))[1] if past else None
            return lambda: client.advance(ids, cache)

        return prepared

    found: dict[str, list[dict[str, Any]]] = {}
    for threads in settings.threads:
        steps = {file.stem: step(OnnxClient(file, threads)) for file in sorted(folder.glob("*.onnx"))}
        only = settings.model_copy(update={"threads": (threads,)})
        for row in timed(steps, only, seq_length, lambda _: None):
            for name in steps:
                milliseconds = row[f"{name}_ms"]
                found.setdefault(f"onnx/{name}", []).append(
                    {
                        "shape": row["shape"],
                        "threads": threads,
                        "model_ms": milliseconds,
                        "tokens_per_s": 1000 * row["tokens"] / milliseconds,
                    }
                )
    return found
