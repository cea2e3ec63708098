"""The recipe's `data.cleaning` and `data.deduplicate`: what is done to a text before it becomes tokens, in the order written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from largeformer.config.section import PositiveInt, Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class HtmlStep(Section):
    """HTML to the text that a browser would show: no tags, scripts, styles or comments; entities decoded; blocks on lines of their own."""

    step: Literal["html"] = "html"


class UnicodeStep(Section):
    """One spelling for characters that look alike (NFC, or NFKC for compatibility forms too), without control characters."""

    step: Literal["unicode"] = "unicode"
    form: Literal["NFC", "NFKC"] = "NFC"
    remove_control: bool = True


class WhitespaceStep(Section):
    """Any blanks in a row become one space, line ends one newline; lines lose the blanks at their ends. `keep_indentation` spares code."""

    step: Literal["whitespace"] = "whitespace"
    max_blank_lines: Annotated[int, Field(ge=0)] = 1
    keep_indentation: bool = False


class LowercaseStep(Section):
    """Lower case, by Unicode's rules for every script that has it."""

    step: Literal["lowercase"] = "lowercase"


class PlaceholdersStep(Section):
    """`<URL>`, `<EMAIL>` and `<NUM>` for what they name, in this order. Each is one symbol of the tokenizer."""

    step: Literal["placeholders"] = "placeholders"
    urls: bool = True
    emails: bool = True
    numbers: bool = True


class CharactersStep(Section):
    """Letters, marks and blanks of every script stay; numbers, punctuation and symbols where asked for; garbage goes.

    `keep` and `drop` name single characters for which the rest of the step is overruled.
    """

    step: Literal["characters"] = "characters"
    numbers: bool = True
    punctuation: bool = True
    symbols: bool = True
    keep: str = ""
    drop: str = ""


class LengthStep(Section):
    """Drops documents out of bounds. A word is a run of letters and digits; where words are not spaced, one character."""

    step: Literal["length"] = "length"
    min_characters: PositiveInt | None = None
    max_characters: PositiveInt | None = None
    min_words: PositiveInt | None = None
    max_words: PositiveInt | None = None


class RepetitionStep(Section):
    """Drops documents that repeat themselves: the limits of Gopher (Rae et al. 2021, arXiv:2112.11446, table A1). 1.0 is no limit.

    Parts of the lines and paragraphs that stand for another time, and of the characters in them; of the characters in the most frequent
    n words in a row (top), and in all that stand more than once (duplicate).
    """

    step: Literal["repetition"] = "repetition"
    duplicate_lines: Fraction = 0.30
    duplicate_line_characters: Fraction = 0.20
    duplicate_paragraphs: Fraction = 0.30
    duplicate_paragraph_characters: Fraction = 0.20
    top_2gram: Fraction = 0.20
    top_3gram: Fraction = 0.18
    top_4gram: Fraction = 0.16
    duplicate_5gram: Fraction = 0.15
    duplicate_6gram: Fraction = 0.14
    duplicate_7gram: Fraction = 0.13
    duplicate_8gram: Fraction = 0.12
    duplicate_9gram: Fraction = 0.11
    duplicate_10gram: Fraction = 0.10


def _named(step: Any) -> Any:
    """A bare name is a step with its defaults."""
    return {"step": step} if isinstance(step, str) else step


AnyStep = HtmlStep | UnicodeStep | WhitespaceStep | LowercaseStep | PlaceholdersStep | CharactersStep | LengthStep | RepetitionStep
CleaningStep = Annotated[AnyStep, Field(discriminator="step"), BeforeValidator(_named)]
STEP_NAMES: tuple[str, ...] = tuple(kind.model_fields["step"].default for kind in get_args(AnyStep))


class MinHashConfig(Section):
    """Near-duplicates by MinHash (Broder 1997): documents whose sets of `ngram` words in a row are alike by `threshold` or more.

    threshold: Jaccard similarity, the part of all n-grams of two documents that both have.
    permutations: numbers in a signature; the estimate's standard error is at most 0.5 / sqrt(permutations).
    """

    threshold: Annotated[float, Field(ge=0.1, le=1.0, allow_inf_nan=False)] = 0.8
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    ngram: Annotated[int, Field(ge=1, le=50)] = 5


class DeduplicateConfig(Section):
    """Only the first of equal documents stays; with `near`, only the first of similar ones. Judged after cleaning, over all sources."""

    exact: bool = True
    near: MinHashConfig | None = None


def cleaning_problems(steps: Sequence[AnyStep], deduplicate: DeduplicateConfig | None) -> Iterator[str]:
    """Steps that undo each other, or do nothing: sentences that name them."""
    yield from _order_problems(steps)
    for i, step in enumerate(steps):
        yield from _step_problems(f"data.cleaning[{i}]", step)
    if deduplicate is not None and not deduplicate.exact and deduplicate.near is None:
        yield "data.deduplicate.exact is false and data.deduplicate.near is null: set one of them, or data.deduplicate to null"


def _order_problems(steps: Sequence[AnyStep]) -> Iterator[str]:
    """What must come before URLs and addresses are found, and what after."""
    numbers, torn, lowered = None, None, None
    for i, step in enumerate(steps):
        if isinstance(step, PlaceholdersStep):
            wanted = " and ".join(name for name in ("urls", "emails") if getattr(step, name))
            if wanted and numbers is not None:
                yield (
                    f"data.cleaning[{i}] looks for {wanted}, whose numbers data.cleaning[{numbers}] has replaced before: "
                    "put the step with urls and emails first, or make one placeholders step of both"
                )
            if wanted and torn is not None:
                yield (
                    f"data.cleaning[{i}] looks for {wanted}, whose signs data.cleaning[{torn}] (characters) has removed before: "
                    "put placeholders before characters"
                )
            numbers = i if step.numbers else numbers
        elif isinstance(step, CharactersStep) and torn is None and not (step.punctuation and step.symbols and not step.drop):
            torn = i
        elif isinstance(step, LowercaseStep) and lowered is None:
            lowered = i
        elif isinstance(step, HtmlStep):
            if lowered is not None:
                yield (
                    f"data.cleaning[{i}] (html) comes after data.cleaning[{lowered}] (lowercase), which spoils entities such as &Eacute;: "
                    "put html first"
                )
            if torn is not None:
                yield f"data.cleaning[{i}] (html) comes after data.cleaning[{torn}] (characters), which removes signs of tags: put it first"


def _step_problems(key: str, step: AnyStep) -> Iterator[str]:
    if isinstance(step, PlaceholdersStep) and not (step.urls or step.emails or step.numbers):
        yield f"{key} (placeholders) replaces nothing: set urls, emails or numbers to true, or remove the step"
    if isinstance(step, CharactersStep) and (both := sorted(set(step.keep) & set(step.drop))):
        yield f"{key} (characters) keeps and drops {''.join(both)!r}: name it in one of them"
    if isinstance(step, LengthStep):
        bounds = (step.min_characters, step.max_characters, step.min_words, step.max_words)
        if not any(bounds):
            yield f"{key} (length) has no bound: give min_characters, max_characters, min_words or max_words"
        for name, low, high in (("characters", *bounds[:2]), ("words", *bounds[2:])):
            if low is not None and high is not None and low > high:
                yield f"{key}.min_{name} {low} is above max_{name} {high}: no document would stay"
