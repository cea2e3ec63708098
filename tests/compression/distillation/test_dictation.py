"""The teacher's answers are the same whatever layout and micro batch they were asked for at, and what is there is not asked again."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from largeformer.compression.distillation.answers import AnswerReader, AnswerWriter, WrittenAnswer, claim, index
from largeformer.compression.distillation.dictation import Dictation
from largeformer.compression.distillation.teacher import Teacher
from largeformer.config.schema import Recipe
from largeformer.models.gpt import build_gpt
from largeformer.parallel.batch import Batch
from largeformer.parallel.device import prepare_device, seed_ranks
from largeformer.parallel.groups import create_groups, destroy_groups
from tests.compression.distillation.courses import perturb
from tests.distributed import RankContext, RankPool
from tests.training.engines import PP2, TP2_SP, global_batch, sgd_recipe

TOP_K, SAMPLES = 6, 16


@dataclass
class Text:
    """Two global batches of eight samples; this data rank's micro batches of them."""

    recipe: Recipe
    data_rank: int
    data_size: int
    consumed_samples: int = 0

    def next(self) -> list[Batch]:
        first, b = self.consumed_samples, self.recipe.train.micro_batch_size
        whole = global_batch(self.recipe, seed=first)
        self.consumed_samples += len(whole.tokens)
        starts = range(self.data_rank * b, len(whole.tokens), b * self.data_size)
        return [_rows(whole, slice(start, start + b), tuple(range(first + start, first + start + b))) for start in starts]


def _rows(batch: Batch, rows: slice, samples: tuple[int, ...]) -> Batch:
    return Batch(batch.tokens[rows], batch.labels[rows], batch.loss_mask[rows], batch.position_ids[rows], samples)


def dictate(ranks: RankContext, recipe: Recipe, folder: Path, stops: bool = False, held: Container[int] = ()) -> bool:
    device, groups = prepare_device(0), create_groups(recipe.layout(ranks.world_size))
    at = groups.coordinates
    seed_ranks(recipe.run.seed, at.tensor, at.data, at.pipeline)
    chunks, shards = build_gpt(recipe, groups, device)
    perturb(shards)
    dictation = Dictation(Teacher(chunks, groups, 3.0), groups, device, recipe.tokenizer.vocab_size, chunk=40, top_k=TOP_K)
    text = Text(recipe, groups.coordinates.data, groups.layout.data)
    finished = dictation.write(text, SAMPLES, held, AnswerWriter(folder, "fp32"), lambda: stops)
    destroy_groups()
    return finished


def answers(folder: Path) -> dict[int, tuple[np.ndarray, ...]]:
    """By sample: ids, log-probabilities, rest."""
    found = {}
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        found |= {int(n): tuple(held[part][row] for part in ("ids", "log_probabilities", "rest")) for row, n in enumerate(held["samples"])}
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 + sp": (2, {"parallel": TP2_SP}),
    "pp2": (2, {"parallel": PP2}),
    "dp2, micro batches of two": (2, {"train": {"micro_batch_size": 2}}),
    "tp2 + sp x pp2": (4, {"parallel": {**TP2_SP, **PP2}, "train": {"micro_batch_size": 4}}),
}


@pytest.fixture(scope="module")
def alone(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    claim(folder, {})
    assert ranks(1).run(dictate, sgd_recipe(), folder) == [True]
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_writes_the_same(name: str, alone: Path, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    world, sections = LAYOUTS[name]
    claim(tmp_path, {})
    assert all(ranks(world).run(dictate, sgd_recipe(**sections), tmp_path))
    expected, found = answers(alone), answers(tmp_path)
    assert sorted(found) == sorted(expected) == list(range(SAMPLES))
    for sample, (ids, values, rest) in expected.items():
        assert ids.dtype == np.uint32 and (found[sample][0] == ids).mean() > 0.99, "but for ties"
        np.testing.assert_allclose(found[sample][1], values, atol=1e-5)
        np.testing.assert_allclose(found[sample][2], rest, atol=1e-5)


def test_what_is_there_is_not_asked_again(alone: Path, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    claim(tmp_path, {})
    assert ranks(1).run(dictate, sgd_recipe(), tmp_path, True) == [False]
    first = index(tmp_path)
    assert sorted(first) == list(range(8)), "what was said before the stop is kept"
    assert ranks(1).run(dictate, sgd_recipe(), tmp_path, False, set(first)) == [True]
    written = index(tmp_path)
    assert sorted(written) == list(range(SAMPLES)) and {n: written[n] for n in first} == first
    assert all(np.array_equal(a, b) for n, there in answers(alone).items() for a, b in zip(there, answers(tmp_path)[n], strict=True))


@pytest.mark.slow
def test_an_interleaved_pipeline_is_asked_for_the_one_that_is_missing(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Its schedule needs as many micro batches as it has stages."""
    interleaved = {**PP2, "virtual_pipeline_model_parallel_size": 2}
    recipe, missing = sgd_recipe(model={"num_layers": 4}, parallel=interleaved), 3
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    for folder, held in ((whole, set()), (rest, set(range(SAMPLES)) - {missing})):
        claim(folder, {})
        assert ranks(2).run(dictate, recipe, folder, False, held) == [True, True]
    assert sorted(index(whole)) == list(range(SAMPLES)) and list(index(rest)) == [missing]
    assert all(np.array_equal(a, b) for a, b in zip(answers(whole)[missing], answers(rest)[missing], strict=True))


def cannot_write(ranks: RankContext, recipe: Recipe, folder: Path) -> str:
    """Rank 0 has no place to write to."""
    try:
        dictate(ranks, recipe, folder if ranks.rank else folder / "gone")
    except OSError as error:
        destroy_groups()
        return type(error).__name__
    return "nothing"


def test_one_rank_that_cannot_write_ends_all(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    claim(tmp_path, {})
    assert ranks(2).run(cannot_write, sgd_recipe(), tmp_path) == ["OSError", "OSError"]


def test_a_reader_gives_what_was_written(alone: Path) -> None:
    reader = AnswerReader(alone, index(alone))
    batch = replace(global_batch(sgd_recipe()), sample_ids=tuple(range(8)))
    reader.begin([batch])
    answer = reader.answer()
    assert isinstance(answer, WrittenAnswer)
    rows, length = batch.tokens.shape
    ids, values, _ = answers(alone)[3]
    assert torch.equal(answer.ids.view(length, rows, TOP_K)[:, 3], torch.from_numpy(ids.astype(np.int64)))
    assert torch.equal(answer.log_probabilities_.view(length, rows, TOP_K)[:, 3], torch.from_numpy(values))
