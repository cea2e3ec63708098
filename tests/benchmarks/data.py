"""Speed and memory of prepare: `python tests/benchmarks/data.py [encoding] [workers] [prepare] [memory] [--megabytes 200]`.

encoding   one process: units of work beside bare sentencepiece over the same texts, CPU time, in turns
workers    two processes beside one, wall time, in turns
prepare    everything from files to indexed dataset, exact deduplication included, beside bare sentencepiece, CPU time of all processes
memory     the largest process, at a quarter of the corpus and at all of it

The corpus is real text (the standard library's, and LARGEFORMER_DATA's where set), repeated and changed a little each time. CPU time
does not care who else is busy; wall time does. Where `tests/benchmarks/loading.py` stands, its part follows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sentencepiece

from largeformer.config.cleaning import DeduplicateConfig
from largeformer.config.data import DataConfig, TokenizerConfig
from largeformer.data.cleaning.cleaner import Cleaner
from largeformer.data.preparation.encoding import Encoder, Task
from largeformer.data.preparation.workers import run_tasks
from largeformer.data.reading.sources import text_files
from largeformer.data.reading.text import Block, Document, read_block
from largeformer.data.reading.units import documents, read_units
from largeformer.data.tokenization.tokenizer import load_tokenizer
from largeformer.data.tokenization.training import train_tokenizer

VOCAB_SIZE = 8192
CLEANING = ["unicode", "whitespace", "placeholders", {"step": "length", "min_characters": 20}, "repetition"]
SYMBOLS = ["<URL>", "<EMAIL>", "<NUM>"]
ROUNDS = 7


def make_corpus(path: Path, megabytes: float) -> None:
    """JSON lines of 1 to 8 kB, each a piece of real text in which some words are others."""
    texts = list(base_texts())
    draw = random.Random(0)
    words = [word for text in draw.sample(texts, 200) for word in text.split()]
    written = 0
    with path.open("w", encoding="utf-8") as handle:
        while written < megabytes * 1e6:
            text = draw.choice(texts)
            start = draw.randrange(max(len(text) - 8000, 1))
            piece = text[start : start + draw.randrange(1000, 8000)].split(" ")
            for i in draw.sample(range(len(piece)), len(piece) // 20):
                piece[i] = draw.choice(words)
            written += handle.write(json.dumps({"text": " ".join(piece)}, ensure_ascii=False) + "\n")


def base_texts() -> Iterator[str]:
    real = os.environ.get("LARGEFORMER_DATA")
    sources = ["python-docs", *([f"{real}/shakespeare.txt", f"{real}/multi30k/train.*.gz", f"{real}/sst2/train.tsv"] if real else [])]
    for source in sources:
        yield from (item.text for item in documents(source) if isinstance(item, Document) and len(item.text) > 2000)


def cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def compare_encoding(corpus: Path, model: Path, folder: Path) -> None:
    tokenizer = load_tokenizer(model, TokenizerConfig(vocab_size=VOCAB_SIZE))
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model))
    encoder = Encoder(tokenizer, Cleaner(()), 2**23, exact=True)
    ratios, rates = [], []
    for unit in list(read_units(text_files(str(corpus)), 2**20, 2**23))[:3]:
        texts = [
            i.text for block in unit.items if isinstance(block, Block) for i in read_block(block, "text", 2**23) if isinstance(i, Document)
        ]
        turns = [
            (
                cpu_seconds(lambda texts=texts: raw.encode(texts, out_type=int, num_threads=1)),
                cpu_seconds(lambda texts=texts: [tokenizer.encode_array(text) for text in texts]),
                cpu_seconds(lambda unit=unit: encoder(Task(unit, "text", folder))),
            )
            for _ in range(ROUNDS)
        ]
        bare, tokenized, whole = (min(turn[i] for turn in turns) for i in range(3))
        ratios.append((bare / tokenized, bare / whole))
        rates.append(sum(len(text.encode()) for text in texts) / 1e6 / bare)
    tokenizing, units = (statistics.median(pair[i] for pair in ratios) for i in range(2))
    print(
        f"encoding: tokenizing {tokenizing:.3f} x bare sentencepiece ({statistics.median(rates):.2f} MB/s on one core); "
        f"a whole unit, from JSON to a part on disk, {units:.3f} x"
    )


def compare_workers(corpus: Path, model: Path, folder: Path) -> None:
    encoder = Encoder(load_tokenizer(model, TokenizerConfig(vocab_size=VOCAB_SIZE)), Cleaner(()), 2**23)
    units = list(read_units(text_files(str(corpus)), 2**20, 2**23))[:64]
    tasks = [Task(unit, "text", folder) for unit in units]

    def seconds(workers: int) -> float:
        begin = time.monotonic()
        for _ in run_tasks(encoder, tasks, workers):
            pass
        return time.monotonic() - begin

    turns = [(seconds(1), seconds(2)) for _ in range(2)]
    one, two = (min(turn[i] for turn in turns) for i in range(2))
    print(f"workers: two are {one / two:.2f} x one ({one:.1f} s, {two:.1f} s for {len(units)} MiB, the processes' start included)")


PREPARE = """
import json, resource, sys, time
from largeformer.stages import prepare
from tests.recipes import tiny_recipe
if __name__ == "__main__":
    begin = time.monotonic()
    import largeformer.stages.prepare, megatron.core, torch
    used = lambda who: (lambda u: u.ru_utime + u.ru_stime)(resource.getrusage(who))
    start = used(resource.RUSAGE_SELF)
    prepare.run(tiny_recipe(**json.loads(sys.argv[1])))
    own, helpers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used(resource.RUSAGE_SELF) - start + used(resource.RUSAGE_CHILDREN)
    print(json.dumps({"cpu": cpu, "wall": time.monotonic() - begin, "own_mb": own.ru_maxrss / 1e3, "helper_mb": helpers.ru_maxrss / 1e3}))
"""


def run_prepare(corpus: Path, model: Path, out: Path, cleaning: list[Any]) -> dict[str, float]:
    recipe = {
        "run": {"output_dir": str(out)},
        "data": {"sources": [{"path": str(corpus)}], "cleaning": cleaning, "deduplicate": {"exact": True}, "prepare_workers": 2},
        "tokenizer": {"vocab_size": VOCAB_SIZE, "model": str(model)},
    }
    script = out.with_suffix(".py")
    script.write_text(PREPARE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(recipe)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare_prepare(corpus: Path, model: Path, folder: Path) -> None:
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model))
    texts = [item.text for item in documents(str(corpus)) if isinstance(item, Document)][::40]
    bare = min(cpu_seconds(lambda: raw.encode(texts, out_type=int, num_threads=1)) for _ in range(2))
    bare_rate = sum(len(text.encode()) for text in texts) / 1e6 / bare
    size = corpus.stat().st_size / 1e6
    for name, cleaning in (("without cleaning", []), ("with cleaning", CLEANING)):
        found = run_prepare(corpus, model, folder / name.replace(" ", "-"), cleaning)
        rate = size / found["cpu"]
        print(
            f"prepare {name}: {rate / bare_rate:.2f} x bare sentencepiece per second of CPU ({rate:.2f} beside {bare_rate:.2f} MB/s); "
            f"{size:.0f} MB in {found['wall']:.0f} s"
        )


def compare_memory(corpus: Path, model: Path, folder: Path) -> None:
    quarter = folder / "quarter.jsonl"
    with corpus.open("rb") as whole, quarter.open("wb") as part:
        size = corpus.stat().st_size // 4
        while part.tell() < size:
            part.write(whole.readline())
    small, large = (run_prepare(path, model, folder / f"memory-{path.stem}", []) for path in (quarter, corpus))
    for what, key in (("the first process", "own_mb"), ("the largest helper", "helper_mb")):
        print(
            f"memory of {what}: {small[key]:.0f} MB at {quarter.stat().st_size / 1e6:.0f} MB of text, {large[key]:.0f} MB at "
            f"{corpus.stat().st_size / 1e6:.0f} MB: {large[key] / small[key]:.3f} x"
        )


PARTS = {"encoding": compare_encoding, "workers": compare_workers, "prepare": compare_prepare, "memory": compare_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all, where none is named")
    parser.add_argument("--megabytes", type=float, default=200.0)
    arguments = parser.parse_args()
    assert DataConfig(cleaning=CLEANING, deduplicate=DeduplicateConfig())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, model = folder / "corpus.jsonl", folder / "tokenizer.model"
        make_corpus(corpus, arguments.megabytes)
        train_tokenizer(base_texts(), TokenizerConfig(vocab_size=VOCAB_SIZE, sample_bytes=2**21, user_symbols=SYMBOLS), model)
        for part in arguments.parts or PARTS:
            PARTS[part](corpus, model, folder)
            sys.stdout.flush()
    loading = Path(__file__).with_name("loading.py")
    if not arguments.parts and loading.exists():
        sys.exit(subprocess.run([sys.executable, str(loading)]).returncode)


if __name__ == "__main__":
    main()
