"""A document's text through the steps of `data.cleaning`, in their order. Every step keeps every script.

A text is changed, or the document is dropped with a reason that names the step and its bound, so that reasons can be counted. A
placeholder is one character to every step (`data/cleaning/placeholders.py`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from largeformer.config.cleaning import (
    AnyStep,
    CharactersStep,
    HtmlStep,
    LengthStep,
    LowercaseStep,
    PlaceholdersStep,
    RepetitionStep,
    UnicodeStep,
    WhitespaceStep,
)
from largeformer.data.cleaning import placeholders
from largeformer.data.cleaning.markup import html_to_text
from largeformer.data.cleaning.repetition import repetition_reason
from largeformer.data.cleaning.words import words

BLANK = "blank after cleaning"


@dataclass(frozen=True)
class Cleaned:
    """text: None where the document is dropped; changed: the steps that changed it; dropped: why it was dropped."""

    text: str | None
    changed: tuple[str, ...] = ()
    dropped: str | None = None


@dataclass(frozen=True)
class Cleaner:
    """`Cleaner(steps)(text) -> Cleaned`: pure, and may be sent to another process. Without steps a text stays as it is."""

    steps: tuple[AnyStep, ...]

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The placeholders that the steps write: each is to be one symbol of the tokenizer."""
        wanted = {symbol for step in self.steps if isinstance(step, PlaceholdersStep) for symbol in placeholders.symbols_of(step)}
        return tuple(symbol for symbol in (placeholders.URL, placeholders.EMAIL, placeholders.NUMBER) if symbol in wanted)

    def __call__(self, text: str) -> Cleaned:
        if not self.steps:
            return Cleaned(text)
        changed: dict[str, None] = {}
        text = placeholders.masked(text, self.symbols) if self.symbols else text
        for step in self.steps:
            if (judge := _FILTERS.get(type(step))) is not None:
                if reason := judge(text, step):
                    return Cleaned(None, tuple(changed), reason)
                continue
            after = _CHANGES[type(step)](text, step)
            if after != text:
                changed[step.step] = None
            text = after
        if not text.strip():
            return Cleaned(None, tuple(changed), BLANK)
        return Cleaned(placeholders.unmasked(text, self.symbols), tuple(changed))


# C0 and C1 without tab, line feed, carriage return; the byte order mark; noncharacters but the masks, which are 32 of them.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
_LINE_ENDS = re.compile("[\x0b\x0c\x85\u2028\u2029]")


def normalise_unicode(text: str, step: UnicodeStep) -> str:
    """Unicode's normal form (Annex 15); control characters vanish, those that end a line become a newline."""
    if step.remove_control and not (text.isascii() and text.isprintable()):
        text = _CONTROL.sub("", _LINE_ENDS.sub("\n", text))
    return text if text.isascii() else unicodedata.normalize(step.form, text)


def normalise_whitespace(text: str, step: WhitespaceStep) -> str:
    """Single spaces, newlines alone, at most `max_blank_lines` blank ones in a row, none at the ends."""
    if step.keep_indentation:
        lines = [line[: len(line) - len(line.lstrip())] + " ".join(line.split()) if line.strip() else "" for line in text.splitlines()]
    else:
        lines = [" ".join(line.split()) for line in text.splitlines()]
    most = "\n" * (step.max_blank_lines + 1)
    return re.sub(most + "\n+", most, "\n".join(lines)).strip("\n")


def _filter_characters(text: str, step: CharactersStep) -> str:
    """`text` without what `step` does not keep; numbers, punctuation and symbols leave a space, garbage leaves nothing."""
    table = {ord(character): _fate(character, step) for character in set(text)}
    table = {code: replacement for code, replacement in table.items() if replacement is not None}
    return text.translate(table) if table else text


# Invisible, and no part of how a script is written: soft hyphen, zero-width space, direction marks, annotation. The joiners stay.
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffd]")
_HAN_ZERO = "\u3007"  # Unicode files it under numbers; it is written as a letter is.


def _fate(character: str, step: CharactersStep) -> str | None:
    """What a character is replaced by; None where it stays."""
    if character in step.keep:
        return None
    if character in step.drop:
        return " "
    category = unicodedata.category(character)
    if category[0] == "N" and character != _HAN_ZERO:
        return None if step.numbers else " "
    if category[0] == "P":
        return None if step.punctuation else " "
    if category[0] == "S" and character != "\ufffd":
        return None if step.symbols else " "
    is_blank = character in "\t\n\r"
    # Unassigned ones (Cn) may be letters of a newer Unicode, or our masks.
    is_garbage = category in ("Cc", "Co", "Cs") or _INVISIBLE.match(character) is not None
    return "" if is_garbage and not is_blank else None


def _length_reason(text: str, step: LengthStep) -> str | None:
    """Which bound the text is beyond, or None."""
    measures: Iterable[tuple[str, int | None, int | None, Callable[[str], int]]] = (
        ("characters", step.min_characters, step.max_characters, len),
        ("words", step.min_words, step.max_words, lambda text: len(words(text))),
    )
    for name, low, high, measure in measures:
        if low is None and high is None:
            continue
        size = measure(text)
        if low is not None and size < low:
            return f"length: under {low} {name}"
        if high is not None and size > high:
            return f"length: above {high} {name}"
    return None


_CHANGES: dict[type, Callable[[str, Any], str]] = {
    HtmlStep: lambda text, _: html_to_text(text),
    UnicodeStep: normalise_unicode,
    WhitespaceStep: normalise_whitespace,
    LowercaseStep: lambda text, _: text.lower(),
    PlaceholdersStep: placeholders.replace,
    CharactersStep: _filter_characters,
}
_FILTERS: dict[type, Callable[[str, Any], str | None]] = {LengthStep: _length_reason, RepetitionStep: repetition_reason}
