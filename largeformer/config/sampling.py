"""The recipe's section `data.sampling`: in which order, and how often, samples come."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from largeformer.config.section import Positive, PositiveInt, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class RandomSampling(Section):
    """Each source in its weight, its samples shuffled anew in each epoch."""

    type: Literal["random"] = "random"


class TemperatureSampling(Section):
    """A source of n tokens has the share n^(1/T), times its weight: T = 1 as large as it is, T -> infinity all alike."""

    type: Literal["temperature"]
    temperature: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]


class CurriculumSampling(Section):
    """Easy samples first: sample k is drawn from the easiest share c(k) of its source, c growing from `start` to 1 over the first
    `span` of the training samples; then the samples come at random. `sorted` has no pool: each epoch runs from easy to hard.

    difficulty: `length` of the documents, `rarity` of the tokens, or a model's `loss`, read from the folder `scores`: a `.npy` file
    for each source, named like its `.bin`, with one number for each sample of an epoch.
    """

    type: Literal["curriculum"]
    difficulty: Literal["length", "rarity", "loss"]
    scores: str | None = None
    pacing: Literal["linear", "root", "step", "sorted"] = "root"
    start: Share = 0.1
    span: Share = 0.5
    steps: PositiveInt = 5


class LossSampling(Section):
    """Sources are drawn by weight x (running loss)^power: harder ones more often. The shares follow the losses every `interval`
    steps; `floor` of every share stays with the weights alone, so that no source is forgotten."""

    type: Literal["loss"]
    power: Positive = 1.0
    interval: PositiveInt = 50
    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    floor: Share = 0.1


SamplingConfig = Annotated[RandomSampling | TemperatureSampling | CurriculumSampling | LossSampling, Field(discriminator="type")]
