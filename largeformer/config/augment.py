"""The recipe's `data.augment`: how training examples are varied, anew in each epoch. Never in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from largeformer.config.section import Positive, PositiveInt, Section

Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class SynonymsStep(Section):
    """Up to `count` words give way to a synonym (EDA, Wei and Zou 2019, arXiv:1901.11196)."""

    step: Literal["synonyms"] = "synonyms"
    count: PositiveInt = 3


class InsertionStep(Section):
    """`count` times, a synonym of some word is put in some place (EDA)."""

    step: Literal["insertion"] = "insertion"
    count: PositiveInt = 1


class SwapStep(Section):
    """`count` times, two words change places (EDA)."""

    step: Literal["swap"] = "swap"
    count: PositiveInt = 1


class DeletionStep(Section):
    """Each word goes with probability `rate`; one always stays (EDA)."""

    step: Literal["deletion"] = "deletion"
    rate: Share = 0.1


class CharacterNoiseStep(Section):
    """Each character of a word is, with probability `rate`, doubled, left out, changed for its neighbour's place or for another letter
    of the text (Belinkov and Bisk 2018, arXiv:1711.02173). A word keeps its first character."""

    step: Literal["character_noise"] = "character_noise"
    rate: Share = 0.05


def _named(step: Any) -> Any:
    return {"step": step} if isinstance(step, str) else step


AnyAugmentStep = SynonymsStep | InsertionStep | SwapStep | DeletionStep | CharacterNoiseStep
AugmentStep = Annotated[AnyAugmentStep, Field(discriminator="step"), BeforeValidator(_named)]


class AugmentConfig(Section):
    """probability: that an example is varied in an epoch.

    steps: what is done to its words, in this order. wordnet: a folder of WordNet's files (Debian's wordnet-base: /usr/share/wordnet);
    synonym_table: a text file, a group of synonyms a line, parted by tabs; it goes before WordNet.
    permute_window: tokens of the input move by less than this many places (masked LM, sequence to sequence, classification).
    permute_sentences: the sentences of a document change places before targets are made (causal LM).
    mixup_alpha: embeddings of two examples and their labels are mixed by Beta(alpha, alpha) (classification).
    """

    probability: Share = 0.1
    steps: tuple[AugmentStep, ...] = ()
    wordnet: str | None = None
    synonym_table: str | None = None
    permute_window: Annotated[int, Field(ge=2)] | None = None
    permute_sentences: bool = False
    mixup_alpha: Positive | None = None


def augment_problems(augment: AugmentConfig | None, family: str, sampling: str) -> Iterator[str]:
    """What would do nothing, or cannot be done: for a causal LM (`family` gpt), which is trained on documents, not on examples."""
    if augment is None:
        return
    needing = [step.step for step in augment.steps if isinstance(step, SynonymsStep | InsertionStep)]
    if needing and augment.wordnet is None and augment.synonym_table is None:
        yield (
            f"data.augment.steps {' and '.join(needing)} need synonyms: give data.augment.wordnet (Debian's wordnet-base puts it in "
            "/usr/share/wordnet) or data.augment.synonym_table"
        )
    if augment.permute_sentences and sampling == "loss":
        yield "data.augment.permute_sentences does not go with data.sampling.type loss yet: set one of them to its default"
    if family != "gpt":
        return
    used = {"steps": augment.steps, "permute_window": augment.permute_window, "mixup_alpha": augment.mixup_alpha}
    named = [f"data.augment.{name}" for name, value in used.items() if value]
    if named:
        verb = "does" if len(named) == 1 else "do"
        yield (
            f"{' and '.join(named)} {verb} not go with model.family gpt: a causal LM would see its own targets changed or out of order. "
            "Use data.augment.permute_sentences"
        )
    elif not augment.permute_sentences:
        yield "data.augment does nothing for model.family gpt: set data.augment.permute_sentences to true, or data.augment to null"
