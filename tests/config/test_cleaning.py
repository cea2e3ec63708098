"""`data.cleaning` and `data.deduplicate`: short forms, and every order or option that would undo itself is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer.config.cleaning import CharactersStep, DeduplicateConfig, HtmlStep, MinHashConfig, PlaceholdersStep, UnicodeStep
from largeformer.config.load import load_recipe, recipe_yaml
from tests.config.recipes import problems_of, write_recipe

# name: (data.cleaning, the problems' beginnings, whole and in order)
BAD: dict[str, tuple[str, list[str]]] = {
    "not a list": ("html", ["data.cleaning is 'html', which should be a list"]),
    "misspelt step": (
        "[htm]",
        ["data.cleaning[0].step is 'htm', which is none of html, unicode, whitespace, lowercase, placeholders, char"],
    ),
    "no step": ("[{form: NFC}]", ["data.cleaning[0].step is missing"]),
    "a number": ("[3]", ["data.cleaning[0] is 3, which should be a section of keys"]),
    "unknown option": ("[{step: unicode, frm: NFC}]", ["unknown key data.cleaning[0].frm; did you mean data.cleaning.form?"]),
    "misspelt choice": ("[{step: unicode, form: NFX}]", ["data.cleaning[0].form is 'NFX', which is none of NFC, NFKC"]),
    "several at once": (
        "[{step: unicode, frm: NFC}, {step: length, min_words: x}, {step: length, min_words: 0}]",
        [
            "unknown key data.cleaning[0].frm",
            "data.cleaning[1].min_words is 'x', which should be a whole number",
            "data.cleaning[2].min_words is 0, which should be above 0",
        ],
    ),
    "above one": ("[{step: repetition, top_2gram: 1.5}]", ["data.cleaning[0].top_2gram is 1.5, which should be at most 1"]),
    "length without a bound": ("[length]", ["data.cleaning[0] (length) has no bound: give min_characters"]),
    "bounds crossed": (
        "[{step: length, min_words: 5, max_words: 4}]",
        ["data.cleaning[0].min_words 5 is above max_words 4: no document would stay"],
    ),
    "no placeholder": (
        "[{step: placeholders, urls: false, emails: false, numbers: false}]",
        ["data.cleaning[0] (placeholders) replaces nothing"],
    ),
    "kept and dropped": ("[{step: characters, keep: ab, drop: bc}]", ["data.cleaning[0] (characters) keeps and drops 'b'"]),
    "numbers before URLs": (
        "[{step: placeholders, urls: false, emails: false}, html, {step: placeholders, numbers: false}]",
        ["data.cleaning[2] looks for urls and emails, whose numbers data.cleaning[0] has replaced before"],
    ),
    "punctuation before URLs": (
        "[{step: characters, punctuation: false}, placeholders]",
        ["data.cleaning[1] looks for urls and emails, whose signs data.cleaning[0] (characters) has removed before"],
    ),
    "html after lower case": (
        "[lowercase, html]",
        ["data.cleaning[1] (html) comes after data.cleaning[0] (lowercase), which spoils entities"],
    ),
    "html after characters": (
        "[{step: characters, symbols: false}, html]",
        ["data.cleaning[1] (html) comes after data.cleaning[0] (characters), which removes signs of tags"],
    ),
}


@pytest.mark.parametrize(("cleaning", "expected"), BAD.values(), ids=BAD)
def test_bad_cleaning_is_told(tmp_path: Path, cleaning: str, expected: list[str]) -> None:
    found = problems_of(tmp_path, f"data.cleaning={cleaning}")
    assert len(found) == len(expected), found
    assert all(problem.startswith(beginning) for problem, beginning in zip(found, expected, strict=True)), found


GOOD = {
    "none": "[]",
    "names alone": "[html, unicode, placeholders, characters, lowercase, whitespace, repetition]",
    "html after placeholders": "[placeholders, html]",
    "urls and numbers in two steps": "[{step: placeholders, numbers: false}, {step: placeholders, urls: false, emails: false}]",
    "garbage alone before URLs": "[characters, placeholders, html]",
    "length from one side": "[{step: length, min_characters: 1}]",
}


@pytest.mark.parametrize("cleaning", GOOD.values(), ids=GOOD)
def test_good_cleaning_is_read_and_written_back(tmp_path: Path, cleaning: str) -> None:
    recipe = load_recipe(write_recipe(tmp_path), [f"data.cleaning={cleaning}"])
    assert load_recipe(write_recipe(tmp_path, recipe_yaml(recipe))) == recipe


def test_steps_keep_their_order_and_options(tmp_path: Path) -> None:
    recipe = load_recipe(
        write_recipe(tmp_path),
        ["data.cleaning=[{step: unicode, form: NFKC}, html, {step: placeholders, numbers: false}, {step: characters, keep: '#'}]"],
    )
    assert recipe.data.cleaning == (UnicodeStep(form="NFKC"), HtmlStep(), PlaceholdersStep(numbers=False), CharactersStep(keep="#"))


@pytest.mark.parametrize("stage", ["prepare", "pretrain"])
@pytest.mark.parametrize("change", ["data.cleaning=[html]", "data.deduplicate={near: {}}"])
def test_cleaning_is_part_of_the_identity(tmp_path: Path, stage: str, change: str) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path).identity(stage) != load_recipe(path, [change]).identity(stage)


def test_deduplicate(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    assert load_recipe(path).data.deduplicate is None
    assert load_recipe(path, ["data.deduplicate={}"]).data.deduplicate == DeduplicateConfig(exact=True, near=None)
    near = load_recipe(path, ["data.deduplicate={near: {threshold: 0.7}}"]).data.deduplicate
    assert near == DeduplicateConfig(near=MinHashConfig(threshold=0.7, permutations=128, ngram=5))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("{exact: false}", "data.deduplicate.exact is false and data.deduplicate.near is null", id="nothing to do"),
        pytest.param(
            "{near: {threshold: 0.0}}", "data.deduplicate.near.threshold is 0.0, which should be at least 0.1", id="everything alike"
        ),
        pytest.param("{near: {thresold: 1}}", "unknown key data.deduplicate.near.thresold; did you mean", id="misspelt"),
        pytest.param("true", "data.deduplicate is true, which should be a section of keys", id="a switch"),
    ],
)
def test_bad_deduplicate_is_told(tmp_path: Path, value: str, expected: str) -> None:
    (problem,) = problems_of(tmp_path, f"data.deduplicate={value}")
    assert problem.startswith(expected)
