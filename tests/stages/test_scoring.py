"""A model's loss of each training sample: what another program computes, and what a curriculum can be made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from tests.distributed import RankContext, RankPool
from tests.stages.test_sampling import recipe_of, train

Ranks = Callable[[int], RankPool]
SHOWN = (0, 1, 7)


def scored(ranks: RankContext, recipe: Recipe, folder: Path) -> None:
    from largeformer.stages import scoring

    scoring.run(recipe, None, folder)


def by_the_twin(ranks: RankContext, recipe: Recipe) -> dict[str, list[float]]:
    """The same losses of a few samples, from the plain PyTorch twin and the indexed files."""
    from largeformer.data.splits import SourceDraws, build_splits
    from largeformer.export.onnx import plain_twin
    from largeformer.export.streaming import StoredTensors
    from largeformer.stages.common import prepared_data

    run = Path(recipe.run.output_dir)
    newest = max((run / "pretrain" / "checkpoints").glob("step_*"))
    plain = plain_twin(StoredTensors.of_checkpoint(newest), recipe.model, recipe.tokenizer.vocab_size)
    data = recipe.data.model_copy(update={"sampling": recipe_of(run.parent, {"type": "loss"}).data.sampling})
    tokenizer = prepared_data.open_tokenizer(recipe, run / "prepare")
    prefixes = prepared_data.prefixes(recipe, run / "prepare")
    splits = build_splits(data, recipe.model.seq_length, tokenizer, prefixes, (8, 0, 0), recipe.run.seed, run.parent / "own-cache")
    assert isinstance(splits.train, SourceDraws)
    found = {}
    for windows in splits.train.windows:
        rows = [torch.from_numpy(windows.read(number)) for number in SHOWN]
        found[windows.dataset_path] = [document_by_document(plain, ids, tokenizer.eod) for ids in rows]
    return found


def document_by_document(plain: Any, ids: torch.Tensor, eod: int) -> float:
    """Nats per token of a window whose documents do not see each other; what follows an end is not foretold."""
    ends = [place + 1 for place, token in enumerate(ids[:-1].tolist()) if token == eod]
    total, counted = 0.0, 0
    for first, last in itertools.pairwise([0, *ends, len(ids) - 1]):
        if last > first:
            tokens, labels = ids[None, first:last], ids[None, first + 1 : last + 1]
            counts = (tokens != eod).float()
            with torch.no_grad():
                total += plain(tokens, labels, counts).item()
            counted += int(counts.sum())
    return total / counted


@pytest.mark.slow
def test_scores_are_losses_and_make_a_curriculum(ranks: Ranks, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"type": "random"})
    ranks(2).run(train, recipe)
    ranks(2).run(scored, recipe, tmp_path / "scores")
    expected = ranks(1).run(by_the_twin, recipe)[0]
    assert len(expected) == 2
    for name, losses in expected.items():
        scores = np.load(tmp_path / "scores" / f"{name}.npy")
        assert [scores[number] for number in SHOWN] == pytest.approx(losses, rel=1e-4)

    tensor = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"tensor_model_parallel_size": 2})})
    ranks(2).run(scored, tensor, tmp_path / "scores-tp2")
    for name in expected:
        ours, theirs = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("scores", "scores-tp2"))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)

    curriculum = {"type": "curriculum", "difficulty": "loss", "scores": str(tmp_path / "scores"), "pacing": "sorted"}
    losses, _ = ranks(2).run(train, _elsewhere(recipe_of(tmp_path, curriculum), tmp_path / "again"))[0]
    assert len(losses) == recipe.train.train_iters

    with pytest.raises(AssertionError, match="is not an empty folder"):
        ranks(1).run(scored, recipe, tmp_path / "scores")


def _elsewhere(recipe: Recipe, folder: Path) -> Recipe:
    return recipe.model_copy(update={"run": recipe.run.model_copy(update={"output_dir": str(folder)})})


def test_random_samples_are_not_scored(ranks: Ranks, tmp_path: Path) -> None:
    from largeformer.stages.scoring import _claim
    from tests.recipes import tiny_recipe

    with pytest.raises(BadInputError, match=r"data\.sources is mock"):
        _claim(tmp_path / "scores", tiny_recipe())
