"""HTML to the text that a browser would show, by the HTML5 parser lexbor (through selectolax).

A parser that follows the standard eats text in which `<` means "less than", since it takes `x<y && y>z` for a tag. So only what
has the name of an HTML element, or a hyphen in its name, and whole attributes counts as a tag here; any other `<` is text, and so is
`&copy=` in an address. Where a block element stands in a text (`<p>`, `<li>`, `<td>`) it is a page: blanks mean nothing outside
`<pre>`, and lines come from the blocks. A text with other tags only keeps its lines; one without tags is not parsed, its entities
are decoded.
"""

from __future__ import annotations

import html
import re

from largeformer.errors import BadInputError

# Marks that pass through the parser as text. Noncharacters, beside those of data/cleaning/placeholders.py.
_PARAGRAPH, _LINE, _BREAK, _CELL = "\ufdd8", "\ufdd9", "\ufdda", "\ufddb"
_KEPT_BLANKS = {" ": "\ufddc", "\n": "\ufddd", "\t": "\ufdde"}
_TO_KEPT, _FROM_KEPT = str.maketrans(_KEPT_BLANKS), str.maketrans({mark: blank for blank, mark in _KEPT_BLANKS.items()})
_OWN_MARKS = re.compile("[\ufdd8-\ufddf]")

_BLOCKS = (
    "address article aside blockquote center details dialog dir dl fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6 header hgroup "
    "hr main menu nav ol optgroup p pre search section summary table ul"
)
_HIDDEN = "applet audio canvas embed head iframe noembed noframes noscript object script style svg template title video"
_HIDDEN_NAMES = tuple(_HIDDEN.split())
_INLINE = (
    "a abbr acronym area b base basefont bdi bdo big body button caption cite code col colgroup data datalist del dfn em font "
    "frame frameset html i img input ins kbd label link map mark math meta meter nobr output param picture portal progress q rp rt "
    "ruby s samp select slot small source span strike strong sub sup tbody textarea tfoot thead time tr track tt u var wbr xmp "
)
# What each element puts around itself, and what inside its start: text between the rows of a table would be moved out of it.
_AROUND = {
    **dict.fromkeys((_HIDDEN + " " + _INLINE).split(), ""),
    **dict.fromkeys(_BLOCKS.split(), _PARAGRAPH),
    **dict.fromkeys(["dd", "div", "dt", "legend", "li", "option"], _LINE),
    **dict.fromkeys(["br", "td", "th"], ""),
}
_INSIDE = {"br": _BREAK, "td": _CELL, "th": _CELL}

_QUOTED = r"""(?:"[^"]*+"|'[^']*+')"""
_TAG = re.compile(rf"""<(?:/?([a-zA-Z][-a-zA-Z0-9]*)(?=[\s/>])((?:[^<>"']|{_QUOTED})*+)>|(![a-zA-Z\[][^<>]*>|\?[a-zA-Z][^<>]*>)|)""")
# Elements whose names are variables elsewhere: their attributes must look like attributes.
_ONE_LETTER_ATTRIBUTES = re.compile(rf"""(?:\s+[A-Za-z_@:][-\w.:]*(?:\s*=\s*(?:{_QUOTED}|[^\s"'=<>`]+))?)*\s*/?""")
_COMMENT = re.compile(r"<!--(?:[^<]|<(?!!--))*?-->")
_QUERY = re.compile(r"&(?=[A-Za-z]+[0-9]*=)")
# A row's mark goes into its first cell.
_ROW = re.compile(rf"(<tr(?=[\s>])[^<>]*>\s*<t[dh][^<>]*>{_CELL})", re.IGNORECASE)
_PRE = re.compile(rf"(<pre(?=[\s>])[^<>]*>{_PARAGRAPH})\n?([^<]*(?:<(?!/?pre\b)[^<]*)*)(?=</pre\b)", re.IGNORECASE)
_MARKUP = re.compile(r"(<[^>]*>)")
_BLANKS = re.compile(r"[ \t\n\r\f]{2,}|[\t\n\r\f]")
_MARKS = re.compile(f"([{_PARAGRAPH}{_LINE}{_BREAK}{_CELL}][{_PARAGRAPH}{_LINE}{_BREAK}{_CELL} ]*)")
# As in browsers, what is nested deeper is flat: the parser's time grows with the square of the depth.
_DEEPEST = 512
_VOID = "area base basefont br col embed frame hr img input link meta param source track wbr"


def html_to_text(text: str) -> str:
    """`text` without markup. Nothing changes where there is neither a tag nor an entity. Never raises for text, however broken."""
    if "<" not in text and "&" not in text:
        return text
    if "<![CDATA[" in text:
        text = text.replace("<![CDATA[", "").replace("]]>", "")
    if "<!--" in text:
        text = _COMMENT.sub("", text)
    text = _QUERY.sub("&amp;", text if text.isascii() else _OWN_MARKS.sub("", text))
    marked = _TAG.sub(_marked, text)
    if not _MARKUP.search(marked):
        return html.unescape(text)
    shown = _parsed(_flat(_PRE.sub(_kept, _ROW.sub(rf"\1{_LINE}", marked))))
    if not any(mark in marked for mark in (_PARAGRAPH, _LINE, _CELL)):
        return shown.replace(_BREAK, "\n")
    parts = _MARKS.split(_BLANKS.sub(" ", shown))
    parts[::2] = [part.strip(" ") for part in parts[::2]]
    parts[1::2] = map(_separator, parts[1::2])
    return "".join(parts).strip("\n\t").translate(_FROM_KEPT)


def _marked(match: re.Match[str]) -> str:
    """A tag with its marks, or `<` as text."""
    name, attributes, declaration = match.groups()
    if declaration is not None:
        return ""
    if name is not None:
        name = name.lower()
        around = _AROUND.get(name, "" if "-" in name else None)
        if around is not None and (len(name) > 1 or not attributes or _ONE_LETTER_ATTRIBUTES.fullmatch(attributes)):
            return f"{around}{match[0]}{_INSIDE.get(name, around)}"
    # What was taken for attributes may hold a tag in its quotes.
    return "&lt;" + _TAG.sub(_marked, match[0][1:])


def _flat(text: str) -> str:
    """`text` without the tags, the hidden elements' aside, that are nested too deep; their marks stay."""
    if text.count("<") - 2 * text.count("</") <= 8 * _DEEPEST:
        return text
    depth, endless = 0, {*_VOID.split(), *_HIDDEN_NAMES}

    def flattened(match: re.Match[str]) -> str:
        nonlocal depth
        name = (match[1] or "").lower()
        if name in endless:
            return match[0]
        depth += -1 if match[0].startswith("</") else 1
        return match[0] if depth <= _DEEPEST else ""

    return _TAG.sub(flattened, text)


def _parsed(text: str) -> str:
    """The text of the parsed tree, without what a browser hides."""
    try:
        from selectolax.lexbor import LexborHTMLParser
    except ImportError as error:
        raise BadInputError("data.cleaning html needs selectolax: pip install 'largeformer[data]', or remove the step") from error
    tree = LexborHTMLParser(text)
    tree.strip_tags(list(_HIDDEN_NAMES))
    return tree.body.text() if tree.body is not None else ""


def _kept(match: re.Match[str]) -> str:
    """Preformatted text, with marks for its blanks; those inside its tags are none."""
    parts = _MARKUP.split(match[2].removesuffix(_PARAGRAPH).removesuffix("\n"))
    parts[::2] = [part.translate(_TO_KEPT) for part in parts[::2]]
    return match[1] + "".join(parts) + _PARAGRAPH


def _separator(marks: str) -> str:
    """What a run of marks stands for."""
    if _PARAGRAPH in marks or marks.count(_BREAK) > 1:
        return "\n\n"
    return "\n" if _LINE in marks or _BREAK in marks else "\t"
