"""The page in a real browser: Chromium draws it, keys and pointer are tried, values are read back from what it shows.

Where no Chromium is found these tests belong to the slow tier, which installs Debian's, as root, or skips.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from largeformer.tracking.report.collect import collect
from largeformer.tracking.report.page import render
from tests.tracking.report.runs import HOSTILE, row, write_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [] if FOUND else [pytest.mark.slow]

Look = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def chromium() -> str:
    if FOUND:
        return FOUND
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("no Chromium on PATH, and it cannot be installed: this needs root and Debian's apt-get")
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False)
    found = shutil.which("chromium")
    if found is None:
        pytest.skip(f"Debian's chromium could not be installed: {done.stderr.strip()[-200:]}")
    return found


@pytest.fixture
def look(chromium: str, tmp_path: Path) -> Look:
    """`look(page, script)`: what `script`, a function's body run in the page, returns; a screenshot lies in `page.png` then."""

    def open_page(page: str, script: str) -> Any:
        probe = f"""<script>{{ const read = () => {{ {script} }}; const p = document.createElement("pre"); p.id = "probe";
            try {{ p.textContent = JSON.stringify(read()); }} catch (e) {{ p.textContent = JSON.stringify(String(e)); }}
            document.body.append(p); }}</script></body>"""
        file = tmp_path / "page.html"
        file.write_text(page.replace("</body>", probe))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1600", f"--user-data-dir={tmp_path / 'profile'}"]
        offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--screenshot={tmp_path / 'page.png'}", "--dump-dom"]
        done = subprocess.run([chromium, *options, *offline, file.as_uri()], capture_output=True, text=True, timeout=240, check=True)
        found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
        assert found is not None, done.stderr[-500:]
        return json.loads(unescape(found.group(1)))

    return open_page


READ = """
const text = id => document.getElementById(id).innerText;
const chart = document.querySelector("[data-chart='train/loss']"), svg = chart.querySelector("svg");
const press = name => svg.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const key = (name, times = 1) => { for (let i = 0; i < times; i++) press(name); };
const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event("input")); };
const path = () => chart.querySelector("path.curve:not(.raw):not(.val)").getAttribute("d");
const seen = {ready: document.documentElement.dataset.ready, title: document.title, facts: text("facts"), samples: text("texts")};
seen.charts = [...document.querySelectorAll(".chart h3")].map(h => h.textContent);
seen.images = document.images.length;
seen.marks = [...chart.querySelectorAll("[data-event]")].map(g => [g.dataset.event, +g.dataset.step]);
svg.focus();
key("Home"); seen.first = chart.querySelector(".tip").innerText;
key("End"); seen.last = chart.querySelector(".tip").innerText;
key("ArrowLeft", 40); seen.spike = chart.querySelector(".tip").innerText;
seen.readout = document.getElementById("readout").textContent;
const smoothed = path(); set("smoothing", 0); seen.smoothing = smoothed !== path(); seen.points = path().match(/[ML]/g).length;
document.querySelector("input[value=tokens]").click(); key("End"); seen.tokens = chart.querySelector(".tip").innerText;
document.querySelector("input[value=step]").click();
document.getElementById("marks").click(); seen.unmarked = chart.querySelectorAll("[data-event]").length;
const linear = path(); document.getElementById("logarithmic").click(); seen.logarithmic = linear !== path();
const box = svg.getBoundingClientRect(), whole = document.getElementById("whole");
for (const [kind, share] of [["pointerdown", .3], ["pointermove", .6], ["pointerup", .6]])
  svg.dispatchEvent(new PointerEvent(kind, {clientX: box.left + box.width * share, clientY: box.top + 90, pointerId: 1, bubbles: true}));
seen.zoomed = [!whole.hidden]; key("Escape"); seen.zoomed.push(!whole.hidden);
return seen;
"""


def test_values_that_the_browser_shows(look: Look, tmp_path: Path) -> None:
    seen = look(render([collect(write_run(tmp_path / "run", 100, changes={30: {"loss": float("nan")}}))]), READ)
    assert isinstance(seen, dict), seen
    assert (seen["ready"], seen["title"], seen["images"]) == ("true", "tiny \u2013 largeformer", 0)
    assert "12,800" in seen["facts"] and "1.25 GiB" in seen["facts"]
    assert seen["charts"][:2] == ["Lossnats per token", "Learning rate"]
    assert seen["marks"] == [["resumed", 60], ["spike", 80], ["nonfinite", 30]]
    assert seen["first"].startswith("step 1\n") and f"tiny {row(1)['loss']:.5g}" in seen["first"]
    assert "step 100" in seen["last"] and f"tiny {row(100)['loss']:.5g}" in seen["last"] and "validation 2.9" in seen["last"]
    assert "step 80: spike, z_score 12.5" in seen["spike"] and seen["readout"].startswith("Loss at step 80")
    assert seen["smoothing"] and seen["points"] == 99
    assert "tokens 12,800" in seen["tokens"] and seen["unmarked"] == 0
    assert seen["logarithmic"] and seen["zoomed"] == [True, False]
    assert HOSTILE.splitlines()[1] in seen["samples"]
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = picture.getcolors(maxcolors=2**24)
    assert picture.size == (1400, 1600) and colours is not None and len(colours) > 50
    blue = sum(count for count, (red, green, blue) in colours if blue > 150 and blue - red > 90)
    assert blue > 400, "the curves are drawn in the first colour"


def test_runs_compared_one_switched_off_and_dark(look: Look, tmp_path: Path) -> None:
    runs = [collect(write_run(tmp_path / name, 60, name, lr)) for name, lr in (("one", 1e-3), ("two", 3e-3))]
    script = """
const curves = () => [...document.querySelectorAll("[data-chart='train/lr'] path.curve:not(.raw)")].map(p => p.dataset.curve);
const page = () => getComputedStyle(document.body).backgroundColor;
const seen = {both: curves(), light: page(), differing: document.getElementById("differing").innerText};
document.querySelector("#legend button").click(); seen.one = curves();
document.getElementById("theme").click(); seen.dark = page();
return seen;
"""
    seen = look(render(runs), script)
    assert isinstance(seen, dict), seen
    assert (seen["both"], seen["one"]) == (["0", "1"], ["1"])
    assert "optimizer.lr" in seen["differing"] and "0.003" in seen["differing"]
    assert seen["light"] != seen["dark"]
