"""`<URL>`, `<EMAIL>` and `<NUM>`: found beside text of any script, and carried through later steps as one character each.

While a text is cleaned a placeholder is a noncharacter of Unicode (U+FDD0 and following), which no step takes for markup, a letter or
garbage; `unmasked` spells it out at the end. Noncharacters are for such internal use: in a text that is read they are removed.
"""

from __future__ import annotations

import re

from largeformer.config.cleaning import PlaceholdersStep
from largeformer.data.cleaning.words import UNSPACED, UNSPACED_BEYOND

URL, EMAIL, NUMBER = "<URL>", "<EMAIL>", "<NUM>"
_MASKS = {URL: "\ufdd0", EMAIL: "\ufdd1", NUMBER: "\ufdd2"}
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")

# A letter or digit of a script that parts words by spaces: such a letter continues a URL, and makes a number part of a name (H2O).
_LETTER = f"[^\\W{UNSPACED}{UNSPACED_BEYOND}]"
_IN_URL = f"(?:{_LETTER}|[-._~:/?#@!$&'*+,;=%])"
_URL_END = f"(?:{_LETTER}|[-_~/#$&*+=%])"
# RFC 3986, letters of other alphabets too (as browsers show them). It ends before Chinese text, which writes no space there, and before
# punctuation that belongs to the sentence; round and square brackets count where they are paired inside.
_URL = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:https?|ftps?|sftp|wss?|git|ssh|file)://|www\.)(?=[^\W_]|[/\[])"
    f"(?:{_IN_URL}*(?:{_URL_END}|\\({_IN_URL}*\\)|\\[{_IN_URL}*\\]))+",
    re.IGNORECASE,
)
_DOMAIN = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9])"
_AT_DOMAIN = re.compile("@" + _DOMAIN)
_EMAIL = re.compile(r"(?<![A-Za-z0-9.!#$%&'*+/=?^_`{|}~-])[A-Za-z0-9_+][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]*+@" + _DOMAIN)
# Digits of any script with separators between them. Not inside a name (x86, 1st), a version (v2.0) or an entity (&#20013;). What must not
# stand before is looked at after the first digit: so the search goes from digit to digit, not from character to character.
_SEPARATOR = "[.,:\uff0c\uff0e]"
_NUMBER = re.compile(
    rf"\d(?<!{_LETTER}\d)(?<!\d{_SEPARATOR}\d)(?<!&#\d)\d*+(?:{_SEPARATOR}\d++)*+(?:[eE][+-]?\d++(?!{_LETTER}))?(?!{_LETTER})",
)


def symbols_of(step: PlaceholdersStep) -> list[str]:
    """The placeholders that `step` writes."""
    return [symbol for symbol, wanted in ((URL, step.urls), (EMAIL, step.emails), (NUMBER, step.numbers)) if wanted]


def replace(text: str, step: PlaceholdersStep) -> str:
    """`text` with masks for its URLs, then e-mail addresses, then numbers."""
    if step.urls and ("://" in text or "www." in text or "WWW." in text):
        text = _URL.sub(_MASKS[URL], text)
    if step.emails and "@" in text and _AT_DOMAIN.search(text):
        text = _EMAIL.sub(_MASKS[EMAIL], text)
    if step.numbers:
        text = _NUMBER.sub(_MASKS[NUMBER], text)
    return text


def masked(text: str, symbols: tuple[str, ...]) -> str:
    """`text` with masks for the placeholders that already stand in it, and without noncharacters of its own."""
    if not text.isascii():
        text = _NONCHARACTERS.sub("", text)
    if "<" in text:
        for symbol in symbols:
            text = text.replace(symbol, _MASKS[symbol])
    return text


def unmasked(text: str, symbols: tuple[str, ...]) -> str:
    """`text` with its masks spelled out."""
    if not text.isascii():
        for symbol in symbols:
            text = text.replace(_MASKS[symbol], symbol)
    return text
