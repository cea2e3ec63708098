"""A text as words and what stands between them, so that words can be changed and the rest stays as it was.

In scripts that part words by spaces a word is a run of letters, marks and digits; Chinese and Japanese words are found by rjieba (jieba's
dictionary and hidden Markov model); Thai and others without either fall into letters. A placeholder is a word of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from largeformer.data.cleaning.placeholders import EMAIL, NUMBER, URL
from largeformer.data.cleaning.words import UNSPACED, UNSPACED_BEYOND, word_pattern, words
from largeformer.errors import BadInputError

PLACEHOLDERS = frozenset({URL, EMAIL, NUMBER})
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_UNSPACED = re.compile(f"[{UNSPACED}{UNSPACED_BEYOND}]")
OUTSIDE = "O"


@dataclass(frozen=True)
class Word:
    """before: what stands between the last word and this one; tag: its label (BIO), None where words have none."""

    before: str
    text: str
    tag: str | None = None

    @property
    def is_free(self) -> bool:
        """Whether it may be changed or moved: no placeholder, and no part of a labelled span."""
        return self.tag in (None, OUTSIDE) and self.text not in PLACEHOLDERS

    @property
    def is_spaced(self) -> bool:
        """Whether its script parts words by spaces."""
        return _UNSPACED.match(self.text) is None


def segment(text: str) -> tuple[list[Word], str]:
    """The words of `text`, and what stands after the last: joined they are `text`. Raises BadInputError where rjieba is missing."""
    found, end = [], 0
    for start, word in _spans(text):
        found.append(Word(text[end:start], word))
        end = start + len(word)
    return found, text[end:]


def joined(found: Sequence[Word], tail: str) -> str:
    """The text of the words."""
    return "".join(word.before + word.text for word in found) + tail


def tagged(texts: Sequence[str], tags: Sequence[str]) -> list[Word]:
    """Words with their labels, as a file of named entities has them."""
    assert len(texts) == len(tags), f"{len(texts)} words, {len(tags)} tags"
    return [Word("", text, tag) for text, tag in zip(texts, tags, strict=True)]


def without(found: Sequence[Word], index: int) -> list[Word]:
    """`found` without one word. The punctuation before it stays, the blanks go."""
    left, rest = found[index].before.rstrip(), [*found[:index], *found[index + 1 :]]
    if index < len(rest):
        after = rest[index].before
        rest[index] = replace(rest[index], before=left + (after if index or left else after.lstrip()))
    return rest


def _spans(text: str) -> Iterator[tuple[int, str]]:
    for match in _pattern().finditer(text):
        run, start = match[0], match.start()
        if not _UNSPACED.match(run):
            yield start, run
            continue
        for word in _cut(run):
            yield start, word
            start += len(word)


def _cut(run: str) -> Sequence[str]:
    """The words of a run of letters without spaces: they cover it."""
    if not _HAN.search(run):
        return words(run)
    try:
        import rjieba
    except ImportError as error:
        raise BadInputError("data.augment finds Chinese words by rjieba: pip install 'largeformer[data]'") from error
    return rjieba.cut(run)  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def _pattern() -> re.Pattern[str]:
    """A placeholder, a run of letters that are not parted by spaces, or a word."""
    names = "|".join(map(re.escape, sorted(PLACEHOLDERS)))
    word = word_pattern().pattern
    return re.compile(f"{names}|(?:(?=[{UNSPACED}{UNSPACED_BEYOND}])(?:{word}))+|{word}")
