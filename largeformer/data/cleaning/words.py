"""Words in any script, by Unicode alone: what the length and repetition filters count and near-duplicates are made of.

A word is a run of letters, marks and digits. In scripts that do not part words by spaces each letter, with its marks, is one: no
dictionary is asked, so that a text gives the same words on every machine. (`data/augmentation/segment.py` asks one.)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache

# Thai, Lao, Tibetan, Myanmar, Khmer; kana and Han with its extensions; the iteration marks and the zero that go with Han.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3041-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
)
UNSPACED_BEYOND = "\U0001b000-\U0001b16f\U00020000-\U000323af"
_BASIC, _BEYOND = range(0x10000), range(0x10000, 0x20000)


def words(text: str) -> list[str]:
    """The words of `text` in their order; punctuation, symbols and blanks are none."""
    return word_pattern().findall(text)


@lru_cache(maxsize=1)
def word_pattern() -> re.Pattern[str]:
    """Characters beyond the basic plane are looked at last, and behind a guard: Python's `re` has a table for the others only."""
    unspaced = re.compile(f"[{UNSPACED}{UNSPACED_BEYOND}]")
    marks = _ranges(_BASIC, lambda c: unicodedata.category(c)[0] == "M")
    spaced, spaced_beyond = (
        _ranges(codes, lambda c: (c.isalnum() or unicodedata.category(c)[0] == "M") and not unspaced.match(c))
        for codes in (_BASIC, _BEYOND)
    )
    beyond = f"(?=[\U00010000-\U000323af])(?:[{spaced_beyond}]+|[{UNSPACED_BEYOND}])"
    return re.compile(f"[{spaced}]+|[{UNSPACED}][{marks}]*|{beyond}")


def _ranges(codes: range, belongs: Callable[[str], bool]) -> str:
    """The characters among `codes` for which `belongs` holds, as the inside of a character class."""
    return "".join(f"{re.escape(first)}-{re.escape(last)}" for first, last in _runs(codes, belongs))


def _runs(codes: range, belongs: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    first = None
    for code in codes:
        if belongs(chr(code)):
            first = code if first is None else first
        elif first is not None:
            yield chr(first), chr(code - 1)
            first = None
    if first is not None:
        yield chr(first), chr(codes[-1])
