from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from largeformer.artifact import Artifact, identity_hash, read_status, write_status
from largeformer.config.load import recipe_yaml
from largeformer.config.schema import Recipe
from largeformer.data.indexed import open_indexed
from largeformer.data.preparation.encoding import Encoder, Task
from largeformer.data.preparation.merging import Merger
from largeformer.data.tokenization.tokenizer import MockTokenizer
from largeformer.errors import BadInputError
from largeformer.stages import prepare
from largeformer.stages.common import prepared_data
from largeformer.stages.common.lock import alone
from tests.recipes import tiny_recipe

ROOT = Path(__file__).parents[2]
ROWS = [f"row {i}: the quick brown fox, number {i * 37}, jumps over 犬 {i}\n" for i in range(200)]


def recipe(folder: Path, *sources: str, **sections: Any) -> Recipe:
    data = {"sources": [{"path": source} for source in sources] or None, "split": "80,10,10", **sections.pop("data", {})}
    tokenizer = {"vocab_size": 360, **sections.pop("tokenizer", {})}
    return tiny_recipe(run={"output_dir": str(folder / "run")}, data=data, tokenizer=tokenizer, **sections)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{row}\n" for row in ROWS))
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": row}) for row in ROWS]
    path.write_text("\n".join([*lines[:50], '{"broken', *lines[50:]]))
    return str(path)


def test_text_becomes_ids_that_decode_to_it(tmp_path: Path, text: str, rows: str) -> None:
    made = recipe(tmp_path, text, rows)
    artifact = prepare.run(made)
    folder = tmp_path / "run" / "prepare"
    assert artifact == Artifact.read(folder)
    assert artifact.identity == identity_hash(made.identity("prepare"))
    beside = ["config.yaml", "files.jsonl", "manifest.json", "quarantine.jsonl", "report.html", "statistics.json", "tokenizer.model"]
    assert sorted(os.listdir(folder)) == ["0-text.bin", "0-text.idx", "1-rows.bin", "1-rows.idx", *beside]
    tokenizer = prepared_data.open_tokenizer(made, folder)
    (first, _), (second, weight) = prepared_data.prefixes(made, folder)
    documents = [open_indexed(prefix, 360) for prefix in (first, second)]
    assert weight == 1.0
    assert tokenizer.decode(documents[0][0].tolist()) == Path(text).read_text()
    assert [tokenizer.decode(documents[1][i].tolist()) for i in range(200)] == ROWS
    assert all(documents[1][i][-1] == tokenizer.eod for i in range(200))
    (rejected,) = (folder / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(rejected)["file"], json.loads(rejected)["line"]) == (rows, 51)


def test_metrics_are_counts_of_the_files(tmp_path: Path, rows: str) -> None:
    metrics = prepare.run(recipe(tmp_path, rows)).metrics
    tokens = (tmp_path / "run/prepare/0-rows.bin").stat().st_size // 2
    size = sum(len(row.encode()) for row in ROWS)
    assert (metrics["documents"], metrics["tokens"], metrics["bytes"], metrics["rejected"]) == (200, tokens, size, 1)
    assert metrics["tokens_per_byte"] == pytest.approx(tokens / size)
    assert metrics["unknown_rate"] == 0.0
    assert metrics["train_tokens"] + metrics["valid_tokens"] + metrics["test_tokens"] == tokens
    assert metrics["train_tokens"] > 6 * metrics["valid_tokens"] > 0 < metrics["test_tokens"]


def test_unknown_characters_are_counted_where_nothing_spells_them(tmp_path: Path, rows: str) -> None:
    with Path(rows).open("a") as handle:
        handle.write("\n" + json.dumps({"text": "".join(chr(0x4E00 + i) for i in range(40))}))
    made = recipe(tmp_path, rows, tokenizer={"vocab_size": 120, "byte_fallback": False, "character_coverage": 0.98})
    artifact = prepare.run(made)
    dataset = open_indexed(tmp_path / "run/prepare/0-rows", 120)
    unknown = sum(int((dataset[i] == 0).sum()) for i in range(len(dataset)))
    assert unknown > 0
    assert artifact.metrics["unknown_rate"] == pytest.approx(unknown / artifact.metrics["tokens"])


def test_a_finished_prepare_is_not_done_again(tmp_path: Path, text: str) -> None:
    made = recipe(tmp_path, text)
    first = prepare.run(made)
    times = {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()}
    for fresh in (False, True):
        assert prepare.run(made, fresh=fresh) == first
        assert {path.name: path.stat().st_mtime_ns for path in first.path.iterdir()} == times


def test_another_recipes_folder_is_refused_or_set_aside(tmp_path: Path, text: str) -> None:
    first = prepare.run(recipe(tmp_path, text))
    other = recipe(tmp_path, text, tokenizer={"vocab_size": 350})
    wanted = identity_hash(other.identity("prepare"))
    said = f"identity {first.identity}, this one is {wanted}: tokenizer.vocab_size was 360, is 350.*--fresh"
    with pytest.raises(BadInputError, match=said):
        prepare.run(other)
    assert Artifact.read(first.path) == first
    assert prepare.run(other, fresh=True).identity == wanted
    third = prepare.run(recipe(tmp_path, text, tokenizer={"vocab_size": 340}), fresh=True)
    kept = {name: Artifact.read(tmp_path / "run" / name) for name in ("prepare.old-1", "prepare.old-2", "prepare")}
    assert [artifact and artifact.identity for artifact in kept.values()] == [first.identity, wanted, third.identity]


def test_what_another_recipe_left_unfinished_is_thrown_away(
    tmp_path: Path, text: str, rows: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Merger, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare.run(recipe(tmp_path, text, rows))
    folder = tmp_path / "run" / "prepare"
    assert Artifact.read(folder) is None
    assert (read_status(tmp_path / "run") or {})["status"] == "failed"
    assert list(folder.glob("work/0-text/part-*.npz"))
    (folder / "9-old.bin").touch()
    assert prepare.run(recipe(tmp_path, rows)).metrics["documents"] == 200
    assert "from other sources, or from files that have changed since" in caplog.text
    assert not {"9-old.bin", "work"} & set(os.listdir(folder))


def test_a_file_that_changes_after_an_interruption_is_read_again(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = recipe(tmp_path, rows, data={"quarantine_threshold": 0.0})
    with pytest.raises(BadInputError, match="what was encoded is kept"):
        prepare.run(made)
    with Path(rows).open("a") as handle:
        handle.write("\n" + json.dumps({"text": "one more"}))
    assert prepare.run(recipe(tmp_path, rows)).metrics["documents"] == 201
    assert "files that have changed since" in caplog.text


def test_another_field_after_a_failure_is_what_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The default field is there in most rows, but is not the text: what was learned and encoded from it must not stay."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"body": row, **({"text": f"title {i}"} if i % 10 else {})}) for i, row in enumerate(ROWS)))
    with pytest.raises(BadInputError, match="20 of 200 inputs were rejected"):
        prepare.run(recipe(tmp_path, str(path), tokenizer={"vocab_size": 300}))
    made = recipe(tmp_path, data={"sources": [{"path": str(path), "text_key": "body"}]}, tokenizer={"vocab_size": 300})
    artifact = prepare.run(made)
    tokenizer, dataset = prepared_data.open_tokenizer(made, artifact.path), open_indexed(artifact.path / "0-rows", 300)
    assert [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))] == ROWS
    alone = prepare.run(made.model_copy(update={"run": made.run.model_copy(update={"output_dir": str(tmp_path / "alone")})}))
    assert (artifact.path / "tokenizer.model").read_bytes() == (alone.path / "tokenizer.model").read_bytes()
    assert "from other fields (text_key)" in caplog.text


def test_a_raised_threshold_takes_up_what_was_encoded(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInputError, match="raise the threshold"):
        prepare.run(recipe(tmp_path, rows, data={"quarantine_threshold": 0.0}))
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded again"))
        assert prepare.run(recipe(tmp_path, rows)).metrics["rejected"] == 1


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.__call__

    def changing(self: Encoder, task: Task) -> tuple[int, int]:
        with Path(rows).open("a") as handle:
            handle.write("\n")
        return encode(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "__call__", changing)
        with pytest.raises(BadInputError, match="changed while they were read"):
            prepare.run(recipe(tmp_path, rows))
    assert prepare.run(recipe(tmp_path, rows)).metrics["documents"] == 200


def test_broken_lines_are_counted_and_placed_exactly(tmp_path: Path) -> None:
    """1 % of 10,000 lines, of every kind; the rest is intact, over several units and two processes."""
    kinds = [b'{"broken', b'{"text": "\xff"}', b'{"body": "x"}', b'{"text": 7}', b"[]", b'{"text": "' + b"z" * 2**15 + b'"}']
    reasons = ["not JSON", "not UTF-8", "no field 'text'", "JSON int", "JSON list", "longer than data.max_document_bytes"]
    broken = set(random.Random(0).sample(range(10_000), 100))
    texts = [f"document {i} " + "word " * (40 + i % 7) for i in range(10_000)]
    lines = [kinds[i % 6] if i in broken else json.dumps({"text": texts[i]}).encode() for i in range(10_000)]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    made = recipe(
        tmp_path,
        str(path),
        data={"max_document_bytes": 2**15, "prepare_workers": 2},
        tokenizer={"sample_bytes": 100_000, "vocab_size": 300},
    )
    artifact = prepare.run(made)
    assert (artifact.metrics["documents"], artifact.metrics["rejected"]) == (9_900, 100)
    rows = [json.loads(line) for line in (artifact.path / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == sorted(i + 1 for i in broken)
    assert all(row["file"] == str(path) and reasons[(row["line"] - 1) % 6] in row["reason"] for row in rows)
    tokenizer = prepared_data.open_tokenizer(made, artifact.path)
    dataset = open_indexed(artifact.path / "0-rows", 300)
    kept = [text for i, text in enumerate(texts) if i not in broken]
    assert all(tokenizer.decode(dataset[i].tolist()) == kept[i] for i in range(0, 9_900, 61))
    with pytest.raises(BadInputError, match=r"100 of 10000 inputs were rejected \(1\.00%\).*allows 0\.90%"):
        prepare.run(recipe(tmp_path / "again", str(path), data={"max_document_bytes": 2**15, "quarantine_threshold": 0.009}))


def test_cleaned_and_without_duplicates(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "doubled.jsonl"
    path.write_text("\n".join(json.dumps({"body": text}) for row in ROWS for text in (row, row.upper())))
    data = {"sources": [{"path": rows}, {"path": str(path), "text_key": "body"}], "cleaning": ["lowercase"], "deduplicate": {"exact": True}}
    made = recipe(tmp_path, data=data)
    with pytest.raises(BadInputError, match=r"doubled.jsonl': nothing is left of 400 documents \(400 duplicate\)"):
        prepare.run(made)
    with path.open("a") as handle:
        handle.write("\n" + json.dumps({"body": "Something New"}))
    artifact = prepare.run(made)
    assert artifact.metrics["dropped"] == {"duplicate": 400}
    assert [source["documents"] for source in artifact.metrics["sources"]] == [200, 1]
    tokenizer = prepared_data.open_tokenizer(made, artifact.path)
    dataset = open_indexed(artifact.path / "1-doubled", 360)
    assert tokenizer.decode(dataset[0].tolist()) == "something new"
    page = (artifact.path / "report.html").read_text()
    assert "lowercase" in page and "duplicate" in page


BAD = {
    "no such file": ({}, ["absent.txt"], "absent.txt' does not exist"),
    "empty corpus": ({}, ["empty.txt"], "empty.txt' is empty"),
    "only blanks": ({}, ["blank.txt"], "blank.txt' holds nothing usable, only blanks"),
    "nothing usable": ({}, ["broken.jsonl"], "2 inputs were rejected, the first: .*broken.jsonl:1: not JSON"),
    "vocabulary too large": ({"tokenizer": {"vocab_size": 5000}}, ["text.txt"], "vocab_size 5000 .* the largest that works is"),
    "bad split": ({"data": {"split": "a,b"}}, ["text.txt"], "data.split 'a,b'"),
    "no such tokenizer": ({"tokenizer": {"model": "absent.model"}}, ["text.txt"], "absent.model cannot be read"),
    "a field where nothing has fields": (
        {"data": {"sources": [{"path": "{here}/text.txt", "text_key": "body"}]}},
        [],
        "text.txt' has text_key 'body', and no file of JSON lines",
    ),
    "the run's own folder": ({}, ["."], "holds run.output_dir .*/run, whose files are no text"),
    "too many rejected": ({"data": {"quarantine_threshold": 0.001}}, ["rows.jsonl"], r"1 of 201 inputs were rejected \(0.50%\).*0.10%"),
}


@pytest.mark.parametrize(("sections", "sources", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_stops_with_its_value_and_no_manifest(
    tmp_path: Path, text: str, rows: str, sections: dict[str, Any], sources: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n\n")
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    sections = json.loads(json.dumps(sections).replace("{here}", str(tmp_path)))
    with pytest.raises(BadInputError, match=message):
        prepare.run(recipe(tmp_path, *(str(tmp_path / source) for source in sources), **sections))
    assert Artifact.read(tmp_path / "run" / "prepare") is None
    assert (read_status(tmp_path / "run") or {})["status"] == "failed"


def test_text_within_the_runs_folder_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "run" / "raw").mkdir(parents=True)
    shutil.copy(text, tmp_path / "run" / "raw")
    assert prepare.run(recipe(tmp_path, str(tmp_path / "run" / "raw"))).metrics["sources"][0]["documents"] > 0


def test_all_bad_sources_are_reported_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    with pytest.raises(BadInputError) as caught:
        prepare.run(recipe(tmp_path, str(tmp_path / "a.txt"), text, str(tmp_path / "b.txt"), str(tmp_path / "broken.jsonl")))
    assert len(caught.value.problems) == 3
    assert len((tmp_path / "run/prepare/quarantine.jsonl").read_text().splitlines()) == 2


def test_a_given_tokenizer_is_copied(tmp_path: Path, text: str, rows: str) -> None:
    trained = prepare.run(recipe(tmp_path / "first", text)).path / "tokenizer.model"
    artifact = prepare.run(recipe(tmp_path / "second", rows, tokenizer={"model": str(trained)}))
    assert (artifact.path / "tokenizer.model").read_bytes() == trained.read_bytes()
    with pytest.raises(BadInputError, match=r"has 360 ids, tokenizer\.vocab_size says 361"):
        prepare.run(recipe(tmp_path / "third", rows, tokenizer={"model": str(trained), "vocab_size": 361}))


def test_random_tokens_need_no_files(tmp_path: Path) -> None:
    made = recipe(tmp_path, "mock")
    artifact = prepare.run(made)
    assert sorted(os.listdir(artifact.path)) == ["config.yaml", "manifest.json"]
    assert prepared_data.open_tokenizer(made, artifact.path) == MockTokenizer(360)


def test_other_ranks_wait_for_the_manifest(tmp_path: Path, text: str) -> None:
    made = recipe(tmp_path, text)
    found: list[Artifact] = []
    waiting = threading.Thread(target=lambda: found.append(prepare.wait_or_load(made, poll_seconds=0.01, timeout=60)))
    waiting.start()
    artifact = prepare.run(made)
    waiting.join(60)
    assert found == [artifact]


def test_who_comes_while_another_prepares_waits_for_it(tmp_path: Path, text: str) -> None:
    """Two processes that find the folder locked, and do the work once."""
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe(tmp_path, text)))
    command = [sys.executable, "-u", "-m", "largeformer", "prepare", "-c", str(tmp_path / "recipe.yaml")]
    with alone(tmp_path / "run" / "prepare", "here"):
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
        said = [process.stdout.readline() for process in both if process.stdout is not None]
    ended = [process.communicate(timeout=120)[0] for process in both]
    assert said == [f"another process is preparing {tmp_path / 'run' / 'prepare'}: waiting for it\n"] * 2
    assert [process.returncode for process in both] == [0, 0]
    assert sum("splits: train" in output for output in ended) == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["prepare", "status.json"]


def test_waiting_ends_when_rank_0_fails_but_not_for_an_earlier_failure(tmp_path: Path, text: str) -> None:
    made = recipe(tmp_path, text)
    write_status(tmp_path / "run", "failed", stage="prepare", error="no text")
    with pytest.raises(TimeoutError, match=r"manifest\.json"):
        prepare.wait_or_load(made, since=time.time() + 1, poll_seconds=0.01, timeout=0.05)
    with pytest.raises(BadInputError, match="prepare failed on the rank that runs it: no text"):
        prepare.wait_or_load(made, since=time.time() - 60, poll_seconds=0.01, timeout=60)


def test_rank_0_prepares_and_the_others_load(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = recipe(tmp_path, text)
    found = []
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29500")
        found.append(prepare.run_or_wait(made))
    assert found[0] == found[1]
