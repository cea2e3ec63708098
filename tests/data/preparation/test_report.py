from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from largeformer.data.preparation.parts import Notes
from largeformer.data.preparation.report import report_page
from largeformer.data.preparation.statistics import SourceStatistics, Statistics

HOSTILE = "</pre><script>alert(1)</script> <img src=x onerror=alert(1)> \"' & \x1b[31m \u202eevil"


def statistics() -> Statistics:
    source = SourceStatistics("0-a", f"/data/{HOSTILE}")
    source.keep(np.array([1, 2, 3, 4, 4000], dtype=np.int32), 9000, 3)
    sample: dict[str, Any] = {"file": HOSTILE, "line": 3, "start": 0, "characters": 80, "before": HOSTILE, "after": f"{HOSTILE} new"}
    notes = Notes(
        {"file": 0, "offset": 0, "line": 1},
        read=9,
        dropped={HOSTILE: 2},
        changed={"html": 4},
        rejected=[("a", 1, f"not JSON: {HOSTILE}"), ("a", 2, f"field {HOSTILE} is")],
        samples=[{**sample, "changed": ["html"], "dropped": None}, {**sample, "changed": [], "dropped": HOSTILE, "after": None}],
    )
    source.note(notes)
    found = Statistics([source, SourceStatistics("1-b", "empty")])
    found.sample(notes)
    return found


METRICS = {"tokens": 4010, "documents": 5, "bytes": 9000, "tokens_per_byte": 0.4455, "unknown_rate": 0.001, "rejected": 2}
SPLITS = {"train_tokens": 4000, "valid_tokens": 10, "test_tokens": 0}


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_text_of_the_data_is_shown_and_never_run() -> None:
    page = report_page(statistics(), {**METRICS, **SPLITS})
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {"script", "img", "iframe", "link", "a"} & tags.seen
    assert not {name for name in tags.attributes if name.startswith("on") or name in ("src", "href")}
    assert "http" not in page and "url(" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert "\x1b" not in page and "\u202e" not in page and "<i class=code>202E</i>" in page


def test_figures_are_those_of_the_statistics() -> None:
    page = report_page(statistics(), {**METRICS, **SPLITS})
    assert "4,010" in page and "0.4455" in page and "train 4,000 (99.8%)" in page
    # 1, 2 to 3, 4 to 7, and 4000 tokens.
    assert re.findall(r"([0-9,]+) to [0-9,]+ tokens: ([0-9]+) documents", page)[:3] == [("1", "1"), ("2", "2"), ("4", "1")]
    assert "2,048 to 4,095 tokens: 1 documents (20.0%)" in page
    assert page == report_page(statistics(), {**METRICS, **SPLITS})


def test_reasons_of_the_quarantine_are_gathered_by_kind() -> None:
    found = statistics()
    assert found.totals("quarantined")["not JSON"] == 1
    assert found.inputs == 11
    assert Statistics([SourceStatistics("0", "p")]).totals("dropped") == {}


def test_documents_of_no_token_stand_with_the_shortest() -> None:
    """A Megatron pair may hold such."""
    source = SourceStatistics("0-a", "a")
    source.keep(np.array([0, 0, 1, 2], dtype=np.int32), 9, 0)
    assert (source.documents, source.tokens, source.lengths[:3]) == (4, 3, [3, 1, 0])
