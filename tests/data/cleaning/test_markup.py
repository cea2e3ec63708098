"""HTML as a browser shows it, and everything that only looks like HTML as it stands."""

from __future__ import annotations

import random

import pytest

from largeformer.data.cleaning.markup import html_to_text

SHOWN = {
    "paragraphs": ("<p>Hello <b>big</b> world</p><p>Two</p>", "Hello big world\n\nTwo"),
    "blanks of a page": ("<p>line one\nline  two</p>", "line one line two"),
    "list without ends": ("<ul>\n <li>a\n <li>b\n</ul>", "a\nb"),
    "table": ("<table><tr><th>A</th><th>B</th></tr>\n <tr><td>1</td><td>2</td></tr></table>after", "A\tB\n1\t2\n\nafter"),
    "line breaks": ("<div>a</div><div>b<br><br>c<br/>d</div>", "a\nb\n\nc\nd"),
    "preformatted": ("<p>x</p><pre>\n a  b\n  <b class='p q'>c</b>\n</pre> y", "x\n\n a  b\n  c\n\ny"),
    "scripts, styles, comments": ("<p>a</p><script>if (a<b) f('<p>')</script><style>b{}</style><!-- c --><p>d</p>", "a\n\nd"),
    "head and hidden elements": ("<head><title>T</title></head><body>x<noscript>n</noscript><svg><text>s</text></svg></body>", "x"),
    "entities": ("<p>&lt;b&gt; &amp; &#20013;&#x6587; &Eacute;", "<b> & 中文 É"),
    "entities without tags": ("&#20013;&#x6587; &amp; &lt;p&gt;", "中文 & <p>"),
    "declarations": ("<!DOCTYPE html><?xml version='1.0'?><p>a</p>", "a"),
    "CDATA": ("<![CDATA[some <b>text</b>]]>", "some text"),
    "greater than in an attribute": ("<a href=\"x>y\" onclick='if(a<b)'>l</a>", "l"),
    "upper case": ("<P>OLD<BR>html</P>", "OLD\nhtml"),
    "custom element": ("a<my-tag x=1>b</my-tag>", "ab"),
    "broken": ("<p>a<b>c</i></div><", "ac\n<"),
    "inline tags keep the lines": ("first <i>line</i>\n\n  second", "first line\n\n  second"),
    "Chinese": ("<title>题</title><p>中文段落。</p><p>第二段<b>粗体</b>字</p>", "中文段落。\n\n第二段粗体字"),
    "ideographic space": ("<p>\u3000\u3000段首</p>", "\u3000\u3000段首"),
}


@pytest.mark.parametrize(("source", "expected"), SHOWN.values(), ids=SHOWN)
def test_what_is_shown(source: str, expected: str) -> None:
    assert html_to_text(source) == expected


KEPT = {
    "less than": "a < b and c > d",
    "less than without blanks": "x<y && y>z, i<n; a<b",
    "looks like a tag of one letter": "if (a<b && c>d) return",
    "types": "vector<int> v; List<String> l; map<K, V>",
    "include": "#include <stdio.h>",
    "shift": "std::cout << x << 3 <<= y",
    "address with parameters": "http://x.y/?a=1&copy=2&lt=3",
    "ampersand": "AT&T, R&D, a && b",
    "mail address": "Jane <jane@example.com>",
    "arrow and heart": "<- <3 <=>",
    "an open comment": "<!-- not closed",
    "half a tag": "the end <p",
    "lines and blanks": "one\n\n\ttwo   three \r\n",
    "placeholders": "\ufdd0 and \ufdd2",
    "nothing": "",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_what_is_no_markup_stays(text: str) -> None:
    assert html_to_text(text) == text


@pytest.mark.parametrize("text", [text for text in KEPT.values() if text.strip() and "\n" not in text and "p" not in text[-2:]])
def test_what_is_no_markup_stays_within_a_page(text: str) -> None:
    assert html_to_text(f"<p>{text}</p><p>more") == f"{text}\n\nmore"


@pytest.mark.parametrize("unit", ["<div>", "<b>", "<ul><li>", "<x-y>", "<!--", "<pre>", "<a '", '<a "', "<", "&", "<table>", "</p>", "<p"])
def test_a_hostile_text_ends(unit: str) -> None:
    """300 kB nested or unclosed: HTML5's algorithm is quadratic in the depth and took minutes."""
    assert html_to_text(unit * (300_000 // len(unit)) + "<p>end</p>").rstrip('"').endswith("end")


def test_what_is_nested_too_deep_loses_no_text() -> None:
    assert html_to_text("".join(f"<div>{i}" for i in range(9000))) == "\n".join(map(str, range(9000)))


def test_any_soup_gives_text_without_marks() -> None:
    rng = random.Random(0)
    bits = [
        "<p>",
        "</p>",
        "<pre>",
        "</pre>",
        "<td>",
        "<tr>",
        "<table>",
        "</table>",
        "<b>",
        "<script>",
        "</script>",
        "<br>",
        "<",
        ">",
        "&lt;",
    ]
    for _ in range(500):
        source = "".join(rng.choice([*bits, "中文", " ", "\n", "a", '"', "'", "\ufdd8", "<li x='y'>", "é"]) for _ in range(30))
        assert not set(html_to_text(source)) & {chr(code) for code in range(0xFDD8, 0xFDE0)}, source
