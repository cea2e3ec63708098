"""Each step alone as a table; then what must hold for any text of any script, by seeded random texts."""

from __future__ import annotations

import pickle
import random
import re
import unicodedata
from pathlib import Path

import pytest

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
from largeformer.data.cleaning.cleaner import BLANK, Cleaned, Cleaner
from largeformer.data.cleaning.words import words

CHINESE = (
    "我们在2024年收集了三百万篇文章，其中“重复”的约占12.5%。\n请见https://example.cn/数据说明，或写信到data.team@mail.example.cn联系。\n"
)
PLACEHOLDERS, WORDS_ONLY = PlaceholdersStep(), CharactersStep(numbers=False, punctuation=False, symbols=False)

STEPS: dict[str, tuple[AnyStep, str, str]] = {
    "NFC joins": (UnicodeStep(), "cafe\u0301", "café"),
    "NFC spares full width": (UnicodeStep(), "ＡＢ①", "ＡＢ①"),
    "NFKC": (UnicodeStep(form="NFKC"), "ＡＢ①ﬁ", "AB1fi"),
    "control characters": (UnicodeStep(), "\ufeffa\x00b\x1bc\td\r\n", "abc\td\r\n"),
    "line ends of other systems": (UnicodeStep(), "a\x0cb\u2028c\x85d", "a\nb\nc\nd"),
    "control characters kept": (UnicodeStep(remove_control=False), "a\x00b", "a\x00b"),
    "joiners stay": (UnicodeStep(), "می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
    "blanks": (WhitespaceStep(), "  a \t b\u3000c\xa0 \r\nd\r\n\r\n\n\n e\n", "a b c\nd\n\ne"),
    "no blank line": (WhitespaceStep(max_blank_lines=0), "a\n\n\nb", "a\nb"),
    "indentation": (WhitespaceStep(keep_indentation=True), "if  x:\n    y  =  1 \n\n\n\n\tz", "if x:\n    y = 1\n\n\tz"),
    "lower case": (LowercaseStep(), "ÀÇ ΑΣ Привет 中文 ＡＢ", "àç ας привет 中文 ａｂ"),
    "URL before Chinese": (PLACEHOLDERS, "请见https://example.cn/a?b=1数据，好", "请见<URL>数据，好"),
    "URL before a full stop": (PLACEHOLDERS, "see http://x.y/z. (http://a.b/c_(d))", "see <URL>. (<URL>)"),
    "URL of other letters": (PLACEHOLDERS, "https://de.wikipedia.org/wiki/Übung ja", "<URL> ja"),
    "URL with numbers and an address": (PLACEHOLDERS, "ftp://me@host.org:21/2024/a1 www.x.com/1", "<URL> <URL>"),
    "no URL": (PLACEHOLDERS, "https:// www. a://b", "https:// www. a://b"),
    "mail beside Chinese": (PLACEHOLDERS, "邮箱是me.too+x@mail.example.cn请联系", "邮箱是<EMAIL>请联系"),
    "no mail": (PLACEHOLDERS, "@functools.wraps a@b x@y.", "@functools.wraps a@b x@y."),
    "numbers beside Chinese": (
        PLACEHOLDERS,
        "第3章，2024年5月，价格3.14元，共1,234个",
        "第<NUM>章，<NUM>年<NUM>月，价格<NUM>元，共<NUM>个",
    ),
    "numbers of other scripts": (PLACEHOLDERS, "１２３ ٣٤ ४२", "<NUM> <NUM> <NUM>"),
    "numbers with signs": (PLACEHOLDERS, "-5 +3.5% 10:30 5e10 192.168.0.1.", "-<NUM> +<NUM>% <NUM> <NUM> <NUM>."),
    "no numbers": (PLACEHOLDERS, "x86 H2O v2.0 1st 3D ab12cd 5km", "x86 H2O v2.0 1st 3D ab12cd 5km"),
    "entities are no numbers": (PLACEHOLDERS, "&#20013;&#x4e2d;", "&#20013;&#x4e2d;"),
    "numbers alone": (PlaceholdersStep(urls=False, emails=False), "http://a.b/7 x@y.zz 7", "http://a.b/<NUM> x@y.zz <NUM>"),
    "garbage": (CharactersStep(), "a\x00b\u200b\ufffd\ue000c\u00add\n\te", "abcd\n\te"),
    "every script": (
        CharactersStep(),
        "Ünï 中文 ภาษาไทย हिन्दी עִברית 한국어 かな 😀👩\u200d🚀 𠀀",
        "Ünï 中文 ภาษาไทย हिन्दी עִברית 한국어 かな 😀👩\u200d🚀 𠀀",
    ),
    "words only": (WORDS_ONLY, "a,b。第3章$二〇年", "a b 第 章 二〇年"),
    "kept and dropped": (CharactersStep(punctuation=False, keep="'", drop="#x"), "don't, #tag x", "don't   tag  "),
}


@pytest.mark.parametrize(("step", "text", "expected"), STEPS.values(), ids=STEPS)
def test_step(step: AnyStep, text: str, expected: str) -> None:
    cleaned = Cleaner((step,))(text)
    assert cleaned == Cleaned(expected, (step.step,) if expected != text else ())


DROPPED: dict[str, tuple[AnyStep, str, str | None]] = {
    "short": (LengthStep(min_characters=5), "abcd", "length: under 5 characters"),
    "long": (LengthStep(max_characters=3), "abcd", "length: above 3 characters"),
    "few words": (LengthStep(min_words=3), "one two", "length: under 3 words"),
    "many words": (LengthStep(max_words=3), "a b c d", "length: above 3 words"),
    "Chinese words": (LengthStep(min_words=5, max_words=5), "你好，世界！2024", None),
    "within": (LengthStep(min_characters=4, max_characters=4), "中文文字", None),
    "lines": (RepetitionStep(), "buy now\n" * 3 + "other\n", "repetition: duplicate_lines above 0.3"),
    "line characters": (
        RepetitionStep(duplicate_lines=1.0),
        "the same long line here\n" * 2 + "a\nb\n",
        "repetition: duplicate_line_characters above 0.2",
    ),
    "paragraphs": (
        RepetitionStep(duplicate_lines=1.0, duplicate_line_characters=1.0),
        "a b\nc\n\n" * 2 + "d\n",
        "repetition: duplicate_paragraphs above 0.3",
    ),
    "top 2-gram": (RepetitionStep(), "buy now " * 3 + "or never again in all of this life", "repetition: top_2gram above 0.2"),
    "Chinese": (RepetitionStep(), "买它买它买它买它，好用的东西", "repetition: top_2gram above 0.2"),
    "plain": (RepetitionStep(), CHINESE.replace("mail.example.cn", "邮箱"), None),
    "short and different": (RepetitionStep(), "hello world", None),
    "blank": (HtmlStep(), "<p> </p>", BLANK),
    "only garbage": (CharactersStep(), "\ue000\u200b", BLANK),
}


@pytest.mark.parametrize(("step", "text", "reason"), DROPPED.values(), ids=DROPPED)
def test_dropped(step: AnyStep, text: str, reason: str | None) -> None:
    cleaned = Cleaner((step,))(text)
    assert cleaned.dropped == reason
    assert cleaned.text == (text if reason is None else None)


CHAIN: tuple[AnyStep, ...] = (
    UnicodeStep(form="NFKC"), PLACEHOLDERS, HtmlStep(), WORDS_ONLY, UnicodeStep(), WhitespaceStep()
)  # fmt: skip


def test_placeholders_survive_every_later_step() -> None:
    text = "<p>Write to <a@b.org> or see &lt;https://x.y/z&gt;, 3 times: <URL></p><p>到2024年，www.x.cn说"
    cleaned = Cleaner((*CHAIN, LowercaseStep()))(text)
    assert cleaned.text == "write to <EMAIL> or see <URL> <NUM> times <URL>\n\n到<NUM>年 <URL>说"
    assert cleaned.changed == ("unicode", "placeholders", "html", "characters", "whitespace", "lowercase")
    assert Cleaner(CHAIN).symbols == ("<URL>", "<EMAIL>", "<NUM>")
    assert Cleaner((PlaceholdersStep(numbers=False),)).symbols == ("<URL>", "<EMAIL>") and Cleaner(()).symbols == ()


def test_chinese_through_the_whole_chain() -> None:
    cleaned = Cleaner((HtmlStep(), UnicodeStep(), PLACEHOLDERS, CharactersStep(), WhitespaceStep(), LowercaseStep()))(CHINESE)
    assert cleaned.text == ("我们在<NUM>年收集了三百万篇文章，其中“重复”的约占<NUM>%。\n请见<URL>数据说明，或写信到<EMAIL>联系。")


def test_no_steps_touch_nothing() -> None:
    assert Cleaner(())(" \ufdd0\x00 ") == Cleaned(" \ufdd0\x00 ")


def random_text(rng: random.Random, size: int = 60) -> str:
    """Letters of many scripts, combining marks, blanks, markup, addresses, placeholders and garbage."""
    pools = [
        "abz AZ",
        "äéßſİ",
        "жщЩ",
        "αςΣ",
        "中文数据三〇",
        "かなカナー",
        "한국어",
        "ภาษาที่",
        "हिन्दी",
        "עִבְ",
        "عربي",
        "😀👩\u200d🚀️",
        "0159٣５",
    ]
    pieces = [
        "http://a.b/c1",
        "me@x.org",
        "<URL>",
        "<NUM>",
        "<EMAIL",
        "<p>",
        "</b>",
        "&amp;",
        "<",
        ">",
        "\n",
        "\r\n",
        "  ",
        "\u3000",
        ",",
        "。",
    ]
    odd = ["\u0301", "\u0338", "\x00", "\ufeff", "\u200b", "\ue000", "\ufdd0", "\ufdd1", "ﬁ", "\u2028", "\t", "$", "1.5", "www.x.y"]
    return "".join(rng.choice(rng.choice([*pools, pieces, odd, odd])) for _ in range(rng.randrange(size)))


IDEMPOTENT: dict[str, tuple[AnyStep, ...]] = {
    "NFC": (UnicodeStep(),),
    "NFKC": (UnicodeStep(form="NFKC"),),
    "whitespace": (WhitespaceStep(),),
    "indentation": (WhitespaceStep(keep_indentation=True, max_blank_lines=0),),
    "lower case": (LowercaseStep(),),
    "placeholders": (PLACEHOLDERS,),
    "characters": (CharactersStep(),),
    "words only": (WORDS_ONLY,),
    "placeholders and words": (PLACEHOLDERS, WORDS_ONLY, WhitespaceStep()),
}


@pytest.mark.parametrize("steps", IDEMPOTENT.values(), ids=IDEMPOTENT)
def test_a_clean_text_stays_as_it_is(steps: tuple[AnyStep, ...]) -> None:
    rng, cleaner = random.Random(1), Cleaner(steps)
    for _ in range(600):
        once = cleaner(random_text(rng)).text
        assert once is None or cleaner(once) == Cleaned(once), repr(once)


def test_placeholders_are_never_torn() -> None:
    """Whatever follows, as many come out as were found."""
    rng, found, cleaner = random.Random(2), Cleaner((UnicodeStep(form="NFKC"), PLACEHOLDERS)), Cleaner((*CHAIN[:2], *CHAIN[3:]))
    whole = re.compile("<URL>|<EMAIL>|<NUM>")
    for _ in range(600):
        text = random_text(rng)
        before, after = found(text).text or "", cleaner(text).text or ""
        assert whole.findall(after) == whole.findall(before), repr(text)
        assert not set(whole.sub("", after)) & set("<>")


def test_letters_of_every_script_survive_the_strictest_filter() -> None:
    rng, cleaner = random.Random(3), Cleaner((WORDS_ONLY,))
    for _ in range(300):
        text = random_text(rng)
        letters = [c for c in text if unicodedata.category(c)[0] == "L"]
        assert [c for c in cleaner(text).text or "" if unicodedata.category(c)[0] == "L"] == letters


def test_a_cleaner_is_the_same_in_another_process() -> None:
    rng, cleaner = random.Random(4), Cleaner((*CHAIN, RepetitionStep()))
    other = pickle.loads(pickle.dumps(cleaner))
    texts = [random_text(rng) for _ in range(50)]
    assert [cleaner(text) for text in texts] == [other(text) for text in texts]


WORDS = {
    "Latin": ("Hello, world's x86_64", ["Hello", "world", "s", "x86", "64"]),
    "Chinese": ("我们在2024年。𠀀", ["我", "们", "在", "2024", "年", "𠀀"]),
    "marks": ("हिन्दी ना\u0301ve שָׁלוֹם", ["हिन्दी", "ना\u0301ve", "שָׁלוֹם"]),
    "Thai": ("ที่ดี", ["ที่", "ดี"]),
    "Korean": ("한국어 글", ["한국어", "글"]),
    "beyond the basic plane": ("😀 𞤀𞤁 𝐀𝐁", ["𞤀𞤁", "𝐀𝐁"]),
}


@pytest.mark.parametrize(("text", "expected"), WORDS.values(), ids=WORDS)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_real_text_is_hardly_touched(real_data: Path) -> None:
    text = (real_data / "shakespeare.txt").read_text()[:100_000]
    cleaned = Cleaner((HtmlStep(), UnicodeStep(), PLACEHOLDERS, CharactersStep(), WhitespaceStep(), RepetitionStep()))(text)
    assert cleaned.text is not None and cleaned.text.split() == text.split()
