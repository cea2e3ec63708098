"""Examples varied for training: words by EDA (Wei and Zou 2019, arXiv:1901.11196), characters, translations there and back.

What comes out depends on the seed, the example's number and the epoch alone: never on the worker or the layout. An epoch varies an
example anew. Labels of a whole text stay valid; labels of words move with them, and labelled spans (B-, I-) are left whole. Tokens are
permuted in `data/augmentation/permutation.py`, embeddings mixed in `data/augmentation/mixup.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from largeformer.config.augment import (
    AnyAugmentStep,
    AugmentConfig,
    CharacterNoiseStep,
    DeletionStep,
    InsertionStep,
    SwapStep,
    SynonymsStep,
)
from largeformer.data.augmentation.segment import OUTSIDE, Word, joined, segment, tagged, without
from largeformer.data.augmentation.synonyms import EitherSynonyms, Synonyms, SynonymTable, WordNet


class BackTranslator(Protocol):
    """Texts into another language and back, one for each, in order: what a sequence-to-sequence model offers once it is trained.

    It must give the same for the same texts, and an empty text for one that it cannot translate: that one then stays as it was.
    """

    def __call__(self, texts: Sequence[str]) -> Sequence[str]: ...


class Augmenter:
    """Varies texts, or words with labels. May be sent to another process.

    seed: the run's. Raises BadInputError where WordNet or the table cannot be read.
    """

    def __init__(self, config: AugmentConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        sources: list[Synonyms] = []
        if config.synonym_table is not None:
            sources.append(SynonymTable(config.synonym_table))
        if config.wordnet is not None:
            sources.append(WordNet(config.wordnet))
        self._synonyms = EitherSynonyms(*sources)

    def text(self, text: str, sample: int, epoch: int) -> str:
        """`text`, varied or not. Blanks and punctuation stay where they can; a text without words passes."""
        rng = self._draw(sample, epoch)
        if rng is None or not text.strip():
            return text
        found, tail = segment(text)
        return joined(self._varied(found, rng), tail)

    def words(self, texts: Sequence[str], tags: Sequence[str], sample: int, epoch: int) -> tuple[list[str], list[str]]:
        """Words and their tags (BIO), varied together. New words are outside of any span; words in spans keep their place."""
        rng = self._draw(sample, epoch)
        found = tagged(texts, tags)
        if rng is not None:
            # A synonym of several words is several words here, too.
            found = [Word("", part, word.tag) for word in self._varied(found, rng) for part in word.text.split(" ")]
        return [word.text for word in found], [word.tag or OUTSIDE for word in found]

    def translated(self, texts: Sequence[str], samples: Sequence[int], epoch: int, translator: BackTranslator) -> list[str]:
        """`texts`, those whose turn it is translated there and back, in one call."""
        chosen = [i for i, sample in enumerate(samples) if texts[i].strip() and self._draw(sample, epoch, "back-translation") is not None]
        varied = list(texts)
        if chosen:
            for i, translation in zip(chosen, translator([texts[i] for i in chosen]), strict=True):
                varied[i] = translation if translation.strip() else texts[i]
        return varied

    def _draw(self, sample: int, epoch: int, purpose: str = "words") -> random.Random | None:
        """The numbers for this example in this epoch; None where it stays as it is."""
        rng = random.Random(f"{self._seed} {purpose} {sample} {epoch}")
        return rng if rng.random() < self._config.probability else None

    def _varied(self, found: list[Word], rng: random.Random) -> list[Word]:
        for step in self._config.steps:
            if found:
                found = _STEPS[type(step)](found, step, rng, self._synonyms)
        return found


def augmenter_for(config: AugmentConfig | None, seed: int, *, training: bool) -> Augmenter | None:
    """What varies the texts of a split: nothing where nothing is asked for, and never in evaluation."""
    return Augmenter(config, seed) if config is not None and training else None


def _replace_synonyms(found: list[Word], step: SynonymsStep, rng: random.Random, synonyms: Synonyms) -> list[Word]:
    """Words are drawn until `count` with a synonym are found."""
    varied, left = list(found), step.count
    for i in rng.sample(range(len(found)), len(found)):
        if not left:
            break
        if found[i].is_free and (others := synonyms.of(found[i].text)):
            varied[i] = replace(found[i], text=_like(found[i].text, rng.choice(others)))
            left -= 1
    return varied


def _insert_synonyms(found: list[Word], step: InsertionStep, rng: random.Random, synonyms: Synonyms) -> list[Word]:
    """As EDA has it, the word whose synonym is put in and the place are drawn apart. Spans are not broken up."""
    varied = list(found)
    for _ in range(step.count):
        source = next((i for i in rng.sample(range(len(found)), len(found)) if found[i].is_free and synonyms.of(found[i].text)), None)
        if source is None:
            break
        text = rng.choice(synonyms.of(found[source].text))
        place = rng.choice([i for i in range(len(varied) + 1) if i == len(varied) or not (varied[i].tag or "").startswith("I-")])
        varied = _inserted(varied, place, replace(found[source], text=text, before=""))
    return varied


def _inserted(found: list[Word], place: int, word: Word) -> list[Word]:
    """`word` before the word at `place`, with a space on each side where its script has them."""
    spaces = word.tag is None and word.is_spaced
    if place == 0:
        first = replace(found[0], before=(" " if spaces else ""))
        return [replace(word, before=found[0].before), first, *found[1:]]
    return [*found[:place], replace(word, before=" " if spaces else ""), *found[place:]]


def _swap(found: list[Word], step: SwapStep, rng: random.Random, synonyms: Synonyms) -> list[Word]:
    varied = list(found)
    free = [i for i, word in enumerate(found) if word.is_free]
    for _ in range(step.count if len(free) > 1 else 0):
        i, j = rng.sample(free, 2)
        varied[i], varied[j] = replace(varied[i], text=varied[j].text), replace(varied[j], text=varied[i].text)
    return varied


def _delete(found: list[Word], step: DeletionStep, rng: random.Random, _: Synonyms) -> list[Word]:
    gone = [i for i, word in enumerate(found) if rng.random() < step.rate and word.is_free]
    if len(gone) == len(found):
        gone.remove(rng.choice(gone))
    for i in reversed(gone):
        found = without(found, i)
    return found


def _disturb_characters(found: list[Word], step: CharacterNoiseStep, rng: random.Random, _: Synonyms) -> list[Word]:
    letters = sorted({letter for word in found if word.is_free for letter in word.text})
    return [replace(word, text=_noisy(word.text, step.rate, letters, rng)) if word.is_free else word for word in found]


def _noisy(text: str, rate: float, letters: Sequence[str], rng: random.Random) -> str:
    characters = list(text)
    i = 1
    while i < len(characters):
        if rng.random() < rate:
            what = rng.randrange(4)
            if what == 0:
                characters.insert(i, characters[i])
                i += 1
            elif what == 1:
                del characters[i]
                continue
            elif what == 2 and i + 1 < len(characters):
                characters[i], characters[i + 1] = characters[i + 1], characters[i]
                i += 1
            else:
                characters[i] = rng.choice(letters)
        i += 1
    return "".join(characters)


def _like(word: str, other: str) -> str:
    """`other` in capitals as `word` is."""
    if len(word) > 1 and word.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


_Step = Callable[[list[Word], Any, random.Random, Synonyms], list[Word]]
_STEPS: dict[type[AnyAugmentStep], _Step] = {
    SynonymsStep: _replace_synonyms,
    InsertionStep: _insert_synonyms,
    SwapStep: _swap,
    DeletionStep: _delete,
    CharacterNoiseStep: _disturb_characters,
}
