"""`evaluate --scores`: the loss of each training sample under a model, as a curriculum by difficulty `loss` reads it.

FOLDER/<source>.npy    float32[windows of an epoch], nats per token, named like the source's `.bin`
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from largeformer.config.chain import entry_named
from largeformer.config.sampling import LossSampling
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.stages.common import prepared_data
from largeformer.stages.common.deployed import deployed
from largeformer.stages.common.inputs import Input, input_of
from largeformer.stages.common.weights import inference_layout
from largeformer.stages.common.world import World, enter_world

if TYPE_CHECKING:
    from largeformer.data.packing import Packing
    from largeformer.data.windows import Windows


def run(recipe: Recipe, source: Path | None, folder: Path) -> None:
    """Score the training split of the model's run with the checkpoint at `source`, and write a file for each source into `folder`.

    Raises BadInputError where the data are mock, or `folder` holds something already.
    """
    from largeformer.data.packing import Packing

    recipe = inference_layout(recipe, discover(os.environ).world_size)
    with enter_world(recipe, training=False) as world:
        given = input_of(recipe, entry_named(recipe, "evaluate"), source)
        world.from_main(lambda: _claim(folder, given.recipe))
        packing = Packing.of(given.recipe.data, prepared_data.open_tokenizer(given.recipe, given.source.prepared.path).eod)
        with deployed(given.recipe, world, given.source.checkpoint) as model:
            for windows in _sources(given):
                scores = _scores(windows, model, packing, given.recipe, world)
                if world.info.is_main:
                    np.save(folder / f"{windows.dataset_path}.npy", scores)
                    told = f"{scores.min():.3f} to {scores.max():.3f} nats a token, mean {scores.mean():.3f}"
                    print(f"{windows.dataset_path}: {len(scores):,} samples, {told}")


def _claim(folder: Path, recipe: Recipe) -> None:
    if recipe.data.is_mock:
        raise BadInputError("data.sources is mock, whose samples are random: there is nothing easy or hard about them")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInputError(f"--scores {folder} is not an empty folder: name another")
    folder.mkdir(parents=True, exist_ok=True)


def _sources(given: Input) -> list[Windows]:
    """The windows of each source, as the curriculum will count them. Collective."""
    from largeformer.data.splits import SourceDraws, build_splits

    recipe, folder = given.recipe, given.source.prepared.path
    by_source = recipe.data.model_copy(update={"sampling": LossSampling(type="loss")})
    splits = build_splits(
        by_source,
        recipe.model.seq_length,
        prepared_data.open_tokenizer(recipe, folder),
        prepared_data.prefixes(recipe, folder),
        (1, 0, 0),
        recipe.run.seed,
        folder / "cache",
    )
    assert isinstance(splits.train, SourceDraws), "that is what sampling by loss makes"
    return splits.train.windows


def _scores(windows: Windows, model: Any, packing: Packing, recipe: Recipe, world: World) -> np.ndarray:
    """float32[windows], alike on every rank: documents are told apart, and their ends counted, as in training. Collective; the data ranks
    share the windows."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    at, layout = world.groups.coordinates, world.groups.layout
    scores = torch.zeros(windows.windows, device=world.device)
    mine = range(at.data, windows.windows, layout.data)
    with torch.no_grad():
        for first in range(0, len(mine), recipe.train.micro_batch_size):
            numbers = list(mine[first : first + recipe.train.micro_batch_size])
            ids = np.stack([windows.read(number) for number in numbers])
            whole = np.ones((len(ids), recipe.model.seq_length), dtype=np.float32)
            batch = packing.batch(ids[:, :-1].copy(), ids[:, 1:].copy(), whole).to(world.device)
            logits = model(batch.tokens, batch.position_ids, batch.attention_mask(), runtime_gather_output=True)
            logits = logits[..., : recipe.tokenizer.vocab_size].float().flatten(0, 1)
            losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none").view(batch.labels.shape)
            scores[numbers] = (losses * batch.loss_mask).sum(dim=1) / batch.loss_mask.sum(dim=1).clamp(min=1.0)
    dist.all_reduce(scores, group=world.groups.data)
    return scores.cpu().numpy()
