"""The recipe's section `quality`: how the models of a chain are compared, and what each stage may cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

from pydantic import Field

from largeformer.config.section import NonNegative, Positive, PositiveInt, Probability, Section
from largeformer.config.sentences import did_you_mean


class LimitsConfig(Section):
    """What a stage's model may differ from the chain's first model by, over held-out text; a stage beyond one fails.

    `max_perplexity_increase`: relative, 0.01 is one per cent. `max_kl`: nats a token.
    """

    max_perplexity_increase: NonNegative | None = None
    max_kl: Positive | None = None
    min_top1_agreement: Probability | None = None


class QualityConfig(Section):
    """`tokens`: of the test split, from its beginning; exports are comparable where `export.gate_tokens` is the same. `shapes`: rows and
    tokens of one call; a single token goes on from half a sequence in the cache. `limits`: by the name of the stage."""

    tokens: PositiveInt = 4096
    shapes: tuple[tuple[PositiveInt, PositiveInt], ...] = ((1, 1), (1, 128), (4, 128))
    threads: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    rounds: PositiveInt = 10
    limits: dict[str, LimitsConfig] = Field(default_factory=dict)


def quality_problems(quality: QualityConfig, stages: Mapping[str, bool]) -> Iterator[str]:
    """Limits of what is no stage, or leaves no model. stages: those of the chain, by name, and whether each leaves one."""
    models = [name for name, leaves in stages.items() if leaves]
    for name in quality.limits:
        if name not in stages:
            yield f"quality.limits names {name}, which is none of run.stages ({', '.join(stages)}){did_you_mean(name, models)}"
        elif name not in models:
            yield f"quality.limits names {name}, which leaves no model to be compared: name one of {', '.join(models)}, or leave it out"
