"""Samples of text while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from largeformer.artifact import Artifact
from largeformer.config.schema import Recipe
from largeformer.errors import BadInputError
from largeformer.stages.common import prepared_data
from largeformer.stages.common.world import World

if TYPE_CHECKING:
    from largeformer.models.gpt import GPT
    from largeformer.training.watchdog import Watchdog


def build_sampler(
    recipe: Recipe, world: World, prepared: Artifact, chunks: Sequence[GPT], watchdog: Watchdog
) -> Callable[[], Sequence[tuple[str, str]]]:
    """What continues each of `tracking.sample_prompts` with the model as it is then: pairs of prompt and text. Collective."""
    from largeformer.evaluation.generation import generate

    if not recipe.tracking.sample_prompts:
        return tuple
    tokenizer = prepared_data.open_tokenizer(recipe, prepared.path)
    ends = world.from_main(lambda: prepared_data.answer_ends(recipe, prepared.path))
    prompts = [(prompt, tokenizer.encode(prompt)[-recipe.model.seq_length + 1 :]) for prompt in recipe.tracking.sample_prompts]

    def sample() -> Sequence[tuple[str, str]]:
        with watchdog.suspended("the samples of text"):
            try:
                texts = generate(chunks, world.groups, [ids for _, ids in prompts], recipe.generate, tokenizer.eod, world.device, ends)
            except BadInputError:  # a model that has diverged writes nothing, and that is for the guards to judge
                return ()
        return [(prompt, tokenizer.decode(ids)) for (prompt, _), ids in zip(prompts, texts, strict=True)]

    return sample
