"""Prepare adds to what is there, takes Megatron's pairs and Hugging Face tokenizers, and real text of several kinds."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from largeformer.artifact import Artifact, identity_hash
from largeformer.config.schema import Recipe
from largeformer.data.indexed import open_indexed
from largeformer.data.preparation.encoding import Encoder
from largeformer.errors import BadInputError
from largeformer.stages import prepare
from largeformer.stages.common import prepared_data
from tests.recipes import tiny_recipe

CHINESE = "大型语言模型需要大量干净的文本。训练之前\uff0c先把网页变成文字\uff0c再去掉重复的段落。春眠不觉晓\uff0c处处闻啼鸟。\n\n"


def recipe(folder: Path, *sources: str, vocab_size: int = 330, tokenizer: dict[str, Any] | None = None, **data: Any) -> Recipe:
    named = {"sources": [{"path": source} for source in sources], "split": "80,10,10", **data}
    return tiny_recipe(run={"output_dir": str(folder)}, data=named, tokenizer={"vocab_size": vocab_size, **(tokenizer or {})})


def write(path: Path, first: int, count: int, broken: bool = False) -> str:
    lines = [json.dumps({"text": f"document {i}, which says that {i} times {i} is {i * i}"}) for i in range(first, first + count)]
    path.write_text("\n".join([*(["{"] if broken else []), *lines]) + "\n")
    return str(path)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


DEDUPLICATE = {"exact": True, "near": {"permutations": 16}}


def test_sources_added_make_what_all_at_once_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tokenizer every file is the same, byte for byte; and what is there is not encoded again."""
    a, b, c = (write(tmp_path / f"{name}.jsonl", *span, broken=True) for name, span in {"a": (0, 90), "b": (50, 90), "c": (80, 90)}.items())
    shared: dict[str, Any] = {"deduplicate": DEDUPLICATE, "quarantine_threshold": 0.1}
    out = tmp_path / "run"
    given = {"model": str(prepare.run(recipe(tmp_path / "t", a, b, quarantine_threshold=0.1)).path / "tokenizer.model")}
    prepare.run(recipe(out, a, b, c, tokenizer=given, **shared))
    whole = files_of(out / "prepare")
    shutil.rmtree(out)
    prepare.run(recipe(out, a, tokenizer=given, **shared))
    encoded = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, task: encoded.append(task.folder.name) or encode(self, task))
    with pytest.raises(BadInputError, match="belongs to another recipe"):
        prepare.run(recipe(out, a, b, c, tokenizer=given, **shared))
    added = recipe(out, a, b, c, tokenizer=given, **shared)
    artifact = prepare.run(added, append=True)
    assert encoded == ["1-b", "2-c"]
    assert artifact.identity == identity_hash(added.identity("prepare"))
    assert files_of(out / "prepare") == whole
    assert artifact.metrics["documents"] == 170 and artifact.metrics["rejected"] == 3
    assert prepare.run(added) == artifact and prepare.run(added, append=True) == artifact
    assert encoded == ["1-b", "2-c"]


def test_new_files_of_a_source_are_added_at_its_end(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "b.jsonl", 0, 50)
    made = recipe(tmp_path / "run", str(folder))
    first = prepare.run(made)
    before = files_of(first.path)
    write(folder / "a.jsonl", 50, 7)
    assert prepare.run(made).metrics["documents"] == 50  # not asked to
    artifact = prepare.run(made, append=True)
    after = files_of(artifact.path)
    assert artifact.metrics["documents"] == 57 and after["tokenizer.model"] == before["tokenizer.model"]
    assert after["0-texts.bin"].startswith(before["0-texts.bin"])
    tokenizer = prepared_data.open_tokenizer(made, artifact.path)
    dataset = open_indexed(artifact.path / "0-texts", 330)
    assert "document 56," in tokenizer.decode(dataset[56].tolist())
    with (folder / "b.jsonl").open("a") as handle:
        handle.write('{"text": "late"}\n')
    with pytest.raises(BadInputError, match=r"b\.jsonl changed since it was prepared"):
        prepare.run(made, append=True)
    assert files_of(artifact.path) == after


REFUSED = {
    "another tokenizer": ({"vocab_size": 320}, ["a"], r"tokenizer\.vocab_size was 330, is 320"),
    "another cleaning": ({"cleaning": ["lowercase"]}, ["a"], r"data\.cleaning was \[\], is"),
    "another order": ({}, ["b", "a"], "--append wants the old sources first"),
    "a source left out": ({}, ["b"], "--append wants the old sources first"),
    "random tokens": ({}, ["a", "mock"], "'mock' makes random tokens"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write(folder / "a.jsonl", 0, 60)
    write(folder / "b.jsonl", 60, 5)
    prepare.run(recipe(folder / "run", str(folder / "a.jsonl")))
    return folder


@pytest.mark.parametrize(("changes", "sources", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_not_added(prepared: Path, changes: dict[str, Any], sources: list[str], message: str) -> None:
    there = files_of(prepared / "run/prepare")
    paths = [source if source == "mock" else str(prepared / f"{source}.jsonl") for source in sources]
    with pytest.raises(BadInputError, match=message):
        prepare.run(recipe(prepared / "run", *paths, **changes), append=True)
    assert files_of(prepared / "run/prepare") == there


def megatron_pair(prefix: Path, documents: list[list[int]], vocab_size: int = 330) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_megatron_pair_is_a_source(prepared: Path, tmp_path: Path, ending: str) -> None:
    model = prepared / "run/prepare/tokenizer.model"
    made = recipe(tmp_path / "run", str(prepared / "b.jsonl"), tokenizer={"model": str(model)})
    tokenizer = prepared_data.open_tokenizer(made, model.parent)
    texts = ["document 3, which says", CHINESE]
    pair = megatron_pair(tmp_path / "their_text_document", [[*tokenizer.encode(text), tokenizer.eod] for text in texts])
    made = recipe(tmp_path / "run", str(prepared / "b.jsonl"), pair + ending, tokenizer={"model": str(model)})
    artifact = prepare.run(made)
    assert (artifact.path / "1-their_text_document.bin").is_symlink()
    (_, _), (prefix, _) = prepared_data.prefixes(made, artifact.path)
    dataset = open_indexed(prefix, 330)
    assert [tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset))] == texts
    theirs = artifact.metrics["sources"][1]
    assert (theirs["documents"], theirs["bytes"]) == (2, sum(len(text.encode()) for text in texts))


BAD_PAIRS = {
    "another end of document": ([[9, 10, 3]], "1 of 1 documents .* do not end with id 2"),
    "ids beyond the vocabulary": ([[9, 329, 2], [400, 2]], "holds id"),
    "no document": ([], "holds no document"),
}


@pytest.mark.parametrize(("documents", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_pair_that_does_not_fit_is_refused(prepared: Path, tmp_path: Path, documents: list[list[int]], message: str) -> None:
    pair = megatron_pair(tmp_path / "theirs", documents)
    with pytest.raises(BadInputError, match=message):
        prepare.run(recipe(tmp_path / "run", pair, tokenizer={"model": str(prepared / "run/prepare/tokenizer.model")}))
    assert Artifact.read(tmp_path / "run/prepare") is None


def test_half_a_pair_and_folders_of_pairs_are_refused(prepared: Path, tmp_path: Path) -> None:
    pair = megatron_pair(tmp_path / "theirs", [[9, 2]])
    with pytest.raises(BadInputError, match=r"hold no text to train a tokenizer on: give tokenizer\.model"):
        prepare.run(recipe(tmp_path / "run", pair))
    with pytest.raises(BadInputError, match="name each pair as a source of its own"):
        prepare.run(recipe(tmp_path / "run", str(tmp_path / "*.bin")))
    os.remove(f"{pair}.idx")
    with pytest.raises(BadInputError, match=r"theirs\.idx is not there: give both files"):
        prepare.run(recipe(tmp_path / "run", f"{pair}.bin"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_chinese_survives_in_every_kind_of_file(prepared: Path, tmp_path: Path, name: str) -> None:
    content = CHINESE * 20
    raw = (content if ".txt" in name else json.dumps({"text": content}, ensure_ascii=False)).encode()
    packed = gzip.compress(raw) if name.endswith(".gz") else zstandard.ZstdCompressor().compress(raw) if name.endswith(".zst") else raw
    (tmp_path / name).write_bytes(packed)
    made = recipe(tmp_path / "run", str(tmp_path / name), tokenizer={"model": str(prepared / "run/prepare/tokenizer.model")})
    artifact = prepare.run(made)
    dataset = open_indexed(artifact.path / "0-a", 330)
    assert prepared_data.open_tokenizer(made, artifact.path).decode(dataset[0].tolist()) == content
    assert artifact.metrics["unknown_rate"] == 0.0


REAL = {
    "shakespeare": ("shakespeare.txt", 1_115_394, 0),
    "multi30k, gzipped": ("multi30k/val.*.gz", 50_000, 0),
    "sst2": ("sst2/dev.tsv", 90_000, 0),
}


@pytest.mark.parametrize(("path", "size", "rejected"), REAL.values(), ids=REAL.keys())
def test_real_text_goes_through_whole(real_data: Path, tmp_path: Path, path: str, size: int, rejected: int) -> None:
    made = recipe(tmp_path / "run", str(real_data / path), vocab_size=512, tokenizer={"sample_bytes": 200_000})
    artifact = prepare.run(made)
    tokenizer = prepared_data.open_tokenizer(made, artifact.path)
    (prefix, _), *_ = prepared_data.prefixes(made, artifact.path)
    dataset = open_indexed(prefix, 512)
    text = "".join(tokenizer.decode(dataset[i].tolist()) for i in range(len(dataset)))
    files = sorted(real_data.glob(path))
    assert text.encode() == b"".join(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes() for file in files)
    assert artifact.metrics["bytes"] == len(text.encode()) >= size and artifact.metrics["rejected"] == rejected
    assert artifact.metrics["tokens_per_byte"] < 0.6
