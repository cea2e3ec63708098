"""What the page holds, read back from its data; what becomes of runs that are broken."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from largeformer import cli
from largeformer.tracking.report.collect import collect
from largeformer.tracking.report.page import MOST_BUCKETS, render, report_data
from tests.tracking.report.runs import HOSTILE, row, write_long, write_run


def data_of(page: str) -> dict[str, Any]:
    """The data as a browser finds them: the text of the element, up to the first `</script`."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("inside", "named"), [("pretrain", "."), ("pretrain/checkpoints", "..")], ids=["within it", "below it"])
def test_a_stage_that_is_named_from_inside(inside: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / inside).mkdir(exist_ok=True)
    monkeypatch.chdir(run / inside)
    found = collect(Path(named))
    assert [stage.name for stage in found.stages] == ["pretrain"] and found.status["status"] == "finished"


def test_curves_events_samples_and_lineage(tmp_path: Path) -> None:
    data = data_of(render([collect(write_run(tmp_path / "run", 100, changes={30: {"loss": float("nan")}}))]))
    (curve,) = data["curves"]
    loss = curve["series"]["train/loss"]
    assert loss["x"] == [step for step in range(1, 101) if step != 30]
    assert loss["y"][-1] == pytest.approx(row(100)["loss"], rel=1e-6)
    assert curve["series"]["val/loss"] == {"x": [50, 100], "y": [2.95, 2.9]}
    assert curve["tokens"]["y"][:2] == [128, 256]
    assert "train/skipped" not in curve["series"] and "train/tokens" not in curve["series"]
    assert [(event["kind"], event["step"], event["level"], event["text"]) for event in curve["events"]] == [
        ("nonfinite", 30, "error", "loss NaN"),
        ("resumed", 60, "info", "checkpoint step_00000050"),
        ("spike", 80, "warn", "z_score 12.5"),
    ]
    assert curve["counts"]["saved"] == 2
    assert ["Best", "2.9000"] in curve["facts"] and ["Peak memory", "1.25 GiB"] in curve["facts"]
    assert [chart["id"] for chart in data["charts"]][:5] == [
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "perf/tokens_per_s",
        "memory/peak_gib",
    ]
    assert data["charts"][0]["series"] == ["train/loss", "val/loss"]
    (run,) = data["runs"]
    assert (run["name"], run["status"], run["problems"]) == ("tiny", "finished", [])
    assert [(stage["name"], stage["parents"]) for stage in run["stages"]] == [
        ("prepare", []),
        ("pretrain", [["prepare", "a" * 16]]),
        ("evaluate", [["pretrain", "b" * 16]]),
    ]
    assert [(sample["stage"], sample["step"], sample["text"]) for sample in run["samples"]] == [
        ("pretrain", 50, HOSTILE),
        ("evaluate", None, "x = 1"),
    ]


def test_what_a_model_writes_is_no_markup(tmp_path: Path) -> None:
    """A parser sees the page's own elements and no other, and nothing that would be loaded from anywhere."""
    seen: list[tuple[str, dict[str, str | None]]] = []

    class Elements(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append((tag, dict(attrs)))

    folder = write_run(tmp_path / "run", 60)
    (folder / "pretrain" / "config.yaml").write_text("run: {name: '</title><script>x</script>'}\n")
    page = render([collect(folder)])
    Elements().feed(page)
    assert [tag for tag, _ in seen].count("script") == 2 and "img" not in [tag for tag, _ in seen]
    assert [attributes for _, attributes in seen if {"src", "href", "srcset"} & {*attributes}] == []
    assert "@import" not in page and "url(http" not in page


def test_differences_between_runs(tmp_path: Path) -> None:
    runs = [collect(write_run(tmp_path / name, 60, name, lr)) for name, lr in (("one", 1e-3), ("two", 3e-3))]
    data = report_data(runs)
    assert [curve["label"] for curve in data["curves"]] == ["one", "two"]
    assert data["differences"] == [{"key": "optimizer.lr", "values": ["0.001", "0.003"]}]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    labels = [curve["label"] for curve in report_data([collect(write_run(tmp_path / name, 60)) for name in "ab"])["curves"]]
    assert labels == [f"{tmp_path}/a / pretrain", f"{tmp_path}/b / pretrain"]


def test_a_stage_alone(tmp_path: Path) -> None:
    run = collect(write_run(tmp_path / "run", 60) / "pretrain")
    assert [stage.name for stage in run.stages] == ["pretrain"] and run.status["status"] == "finished"


def test_steps_done_over_are_drawn_once(tmp_path: Path) -> None:
    """After a rewind within a run the same steps are logged again: the later ones count."""
    folder = tmp_path / "run" / "pretrain"
    folder.mkdir(parents=True)
    rows = [row(1), row(2, loss=9.0), {"step": 2, "val_loss": 9.0}, row(3, loss=9.5), row(2, loss=1.0), {"step": 2, "val_loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (curve,) = report_data([collect(folder)])["curves"]
    assert curve["series"]["train/loss"]["x"] == [1, 2] and curve["series"]["train/loss"]["y"][1] == 1.0
    assert curve["series"]["val/loss"] == {"x": [2], "y": [1.5]}


BROKEN = {
    "half a line": ("metrics.jsonl", lambda raw: raw[:-20], "metrics.jsonl: 1 line of 62 not whole (line 62), left out"),
    "garbage within": ("metrics.jsonl", lambda raw: b"\xff\x00\n[1]\n{}\n" + raw, "3 lines of 65 not whole (lines 1, 2, 3), left out"),
    "no number": ("metrics.jsonl", lambda raw: b'{"step": 1, "loss": NaN}\n' + raw, "1 line of 63 not whole (line 1), left out"),
    "half an event": ("events.jsonl", lambda raw: raw + b'{"event": "spi', "events.jsonl: 1 line of 5 not whole (line 5), left out"),
    "recipe": ("config.yaml", lambda raw: b"run: [", "config.yaml cannot be read (ParserError): the report goes on without it"),
    "recipe with a tag": ("config.yaml", lambda raw: b"run: !!python/object:os.system x", "config.yaml cannot be read (ConstructorError)"),
    "manifest": ("manifest.json", lambda raw: raw[:30], "manifest.json is broken"),
}


@pytest.mark.parametrize(("name", "spoil", "sentence"), BROKEN.values(), ids=BROKEN)
def test_goes_on_with_what_is_whole(name: str, spoil: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", 61)
    file = folder / "pretrain" / name
    file.write_bytes(spoil(file.read_bytes()))
    assert cli.main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    data = data_of((tmp_path / "report.html").read_text())
    assert len(data["curves"][0]["series"]["train/loss"]["x"]) >= 60
    (problem,) = data["runs"][0]["problems"]
    assert sentence in problem and problem in capsys.readouterr().out


def test_status_that_is_garbage_is_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 60)
    (folder / "status.json").write_text("[]")
    run = collect(folder)
    assert run.status == {} and "status.json is broken" in run.problems[0]


BAD = {
    "no such folder": (["{}/nowhere"], "nowhere: there is no such folder; name a run's output folder"),
    "not a run": (["{}"], "holds neither metrics.jsonl nor a stage that does"),
    "both": (["{}", "{}/nowhere"], "nowhere: there is no such folder"),
    "output is a folder": (["{}/run", "-o", "{}"], "is a folder: name a file, such as -o report.html"),
    "no folder for the output": (["{}/run", "-o", "{}/x/y.html"], "the folder {}/x does not exist"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "run" in arguments[0]:
        write_run(tmp_path / "run", 2)
    (tmp_path / "other").mkdir()
    output = [] if "-o" in arguments else ["-o", str(tmp_path / "r.html")]
    assert cli.main(["report", *(part.format(tmp_path) for part in arguments), *output]) == 2
    error = capsys.readouterr().err
    assert message.format(tmp_path) in error and "Traceback" not in error
    assert error.count("error: ") == (2 if arguments == BAD["both"][0] else 1)


def test_a_long_run_stays_small_and_keeps_its_spikes(tmp_path: Path) -> None:
    """100,000 steps; the promise on time is measured in tests/benchmarks/report.py."""
    write_long(tmp_path / "run" / "pretrain", 100_000, {70_001: {"loss": 99.0, "grad_norm": 55.0}})
    page = render([collect(tmp_path / "run")])
    assert len(page.encode()) < 5e6
    series = data_of(page)["curves"][0]["series"]
    assert len(series["train/loss"]["x"]) <= 2 * MOST_BUCKETS + 2
    for name, peak in (("train/loss", 99.0), ("train/grad_norm", 55.0)):
        assert (70_001, peak) in [*zip(series[name]["x"], series[name]["y"], strict=True)]


def test_many_runs_stay_small(tmp_path: Path) -> None:
    write_long(tmp_path / "run" / "pretrain", 20_000, {})
    runs = [collect(tmp_path / "run")] * 20
    assert len(render(runs).encode()) < 5e6
