"""Rules about how batches are made: splits, packing, sampling. Like `config/checks.py`, sentences that name keys, values and the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator

from largeformer.config.data import DataConfig
from largeformer.config.sampling import CurriculumSampling, LossSampling
from largeformer.config.schema import Recipe


def data_problems(recipe: Recipe) -> list[str]:
    return [*_split_problems(recipe.data), *_packing_problems(recipe), *_sampling_problems(recipe.data, recipe.guards.rewinds)]


def _split_problems(data: DataConfig) -> Iterator[str]:
    if (shares := _shares(data.split)) is None or shares[0] == 0:
        yield f"data.split '{data.split}' is not three shares for training, validation and test, the first above 0, such as '96,2,2'"
        return
    for number, source in enumerate(data.sources):
        if source.split is not None and _shares(source.split) is None:
            yield (
                f"data.sources.{number}.split '{source.split}' is not three shares for training, validation and test, one of them above 0, "
                "such as '0,1,0' to validate with this source alone"
            )
    given = [_shares(split) for split in data.splits]
    if all(shares is not None and shares[0] == 0 for shares in given):
        yield "data.sources have each a split without training: give one of them a first share above 0, or leave out its split"


def _shares(split: str) -> list[float] | None:
    """Three finite shares, not all 0; None where they are not."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    return shares if len(shares) == 3 and all(math.isfinite(share) and share >= 0 for share in shares) and sum(shares) > 0 else None


def _packing_problems(recipe: Recipe) -> Iterator[str]:
    data, position = recipe.data, recipe.model.position_embedding
    if data.reset_position_ids and not data.reset_attention_mask and position != "learned":
        yield (
            f"data.reset_position_ids true changes nothing with model.position_embedding {position}, whose positions are relative, while "
            "data.reset_attention_mask is false: set that to true as well, or this to false"
        )


def _sampling_problems(data: DataConfig, rewinds: bool) -> Iterator[str]:
    sampling = data.sampling
    if data.is_mock and sampling.type != "random":
        yield f"data.sampling.type {sampling.type} needs text; data.sources holds mock, whose tokens are random: set it to random"
    if isinstance(sampling, CurriculumSampling) and (sampling.difficulty == "loss") != (sampling.scores is not None):
        yield (
            f"data.sampling.difficulty {sampling.difficulty} and data.sampling.scores {sampling.scores or 'null'} do not go together: "
            "loss needs a folder of scores, the others have none"
        )
    if isinstance(sampling, LossSampling) and len(data.sources) < 2:
        yield "data.sampling.type loss weighs sources against each other, and data.sources holds one: add another, or set it to random"
    if isinstance(sampling, LossSampling) and data.num_workers:
        yield (
            f"data.sampling.type loss decides as training goes; data.num_workers {data.num_workers} would run ahead of it: set it to 0, "
            "which loads in a thread"
        )
    if isinstance(sampling, LossSampling) and rewinds:
        yield "data.sampling.type loss does not go with guards.spike_action rewind: the shares would know what is left out. Set that to log"
