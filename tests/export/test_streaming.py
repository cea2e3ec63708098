"""Safetensors of ours against the library's, blocks of a distributed checkpoint, broken files, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from largeformer.checkpoint import format as checkpoint_format
from largeformer.checkpoint.format import Block, write_blocks
from largeformer.errors import BadInputError
from largeformer.export.streaming import Entry, ShardedWriter, StoredTensors

GENERATOR = torch.Generator().manual_seed(0)
TENSORS = {
    "matrix": torch.randn(7, 5, generator=GENERATOR),
    "half": torch.randn(3, 4, generator=GENERATOR).bfloat16(),
    "bytes": torch.arange(-5, 6, dtype=torch.int8),
    "packed": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "shape": torch.tensor([7, 5]),
    "empty": torch.empty(0, 3),
}


def entries() -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (100, 2), (1, 6)])
def test_the_library_reads_what_is_written_in_parts(tmp_path: Path, limit: int, files: int) -> None:
    with ShardedWriter(tmp_path, entries(), limit) as writer:
        for name in reversed(TENSORS):
            for row in TENSORS[name].split(2):
                writer.append(name, row)
    found = {}
    for path in tmp_path.glob("*.safetensors"):
        found.update(load_file(path))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (files > 1)
    if files > 1:
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in TENSORS.values())
        assert all(name in load_file(tmp_path / file) for name, file in content["weight_map"].items())


def test_rows_that_are_missing_or_too_many_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not all rows"), ShardedWriter(tmp_path, entries(), 10**9) as writer:
        writer.append("matrix", TENSORS["matrix"])
    with pytest.raises(AssertionError, match="more rows"), ShardedWriter(tmp_path, entries(), 10**9) as writer:
        writer.append("matrix", torch.zeros(8, 5))


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    stored = StoredTensors.of_folder(tmp_path)
    assert set(stored.names) == set(TENSORS)
    assert all(torch.equal(stored.read(name), tensor) for name, tensor in TENSORS.items())


def test_blocks_of_a_distributed_checkpoint_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks' files: one holds upper rows and left columns, the other the rest."""
    monkeypatch.setattr(checkpoint_format, "_CHUNK", 30)  # two rows of three floats at a time
    whole = torch.arange(48.0).reshape(8, 6)
    for rank in range(2):
        rows = Block("rows", whole[4 * rank :][:4], (4 * rank, 0), (8, 6))
        columns = Block("columns", whole[:, 3 * rank :][:, :3].contiguous(), (0, 3 * rank), (8, 6))
        write_blocks(tmp_path / f"rank_{rank}.safetensors", [rows, columns])
    stored = StoredTensors.of_folder(tmp_path)
    for name in ("rows", "columns"):
        assert torch.equal(stored.read(name), whole), name
    (tmp_path / "rank_1.safetensors").unlink()
    with pytest.raises(BadInputError, match="does not hold columns of shape"):
        StoredTensors.of_folder(tmp_path).read("columns")


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "text": (lambda _: b"version https://git-lfs.github.com/spec/v1", "is no safetensors file of this format"),
    "empty": (lambda _: b"", "is no safetensors file of this format"),
    "cut short": (lambda whole: whole[:-8], "is no safetensors file of this format"),
    "outside the file": (lambda whole: whole.replace(b"[0,140]", b"[0,999]"), "is no safetensors file of this format"),
    "unknown dtype": (lambda whole: whole.replace(b'"F32"', b'"F99"'), "is no safetensors file of this format"),
}


@pytest.mark.parametrize(("harm", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_bad_input(tmp_path: Path, harm: Callable[[bytes], bytes], sentence: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"matrix": TENSORS["matrix"]}, path)
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(BadInputError, match=sentence):
        StoredTensors.of_folder(tmp_path).read("matrix")


def test_a_folder_without_weights_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"holds no \.safetensors file"):
        StoredTensors.of_folder(tmp_path)


MEASURE = """
import sys
from pathlib import Path
import torch
from largeformer.config.schema import ModelConfig
from largeformer.compression.quantization.schemes import Scheme
from largeformer.export.compressed_tensors import Compressed, Quantization
from largeformer.export.huggingface import Plain, write_weights
from largeformer.export.own import write_own
from largeformer.export.streaming import StoredTensors
from largeformer.models.hf_mapping import rows, shapes
import compressed_tensors.compressors
torch.set_num_threads(1)
source, target, scheme = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
model = ModelConfig.model_validate_json(sys.argv[4])
stored = StoredTensors.of_folder(source)
encoder = Plain(torch.float32)
if scheme in ("int8", "int4"):
    given = {"int8": Scheme(bits=8, activations="token"), "int4": Scheme(bits=4, group_size=128)}[scheme]
    style = "llama"
    encoder = Compressed(Quantization(given), torch.float32, shapes(rows(model, style), model, 1000))
small = torch.randn(64, 128)
def peak():  # of this program alone: ru_maxrss begins with that of the process which started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
if scheme.startswith("own"):
    write_own(stored, model, torch.bfloat16 if scheme == "own, bf16" else None, "", None, target, 400_000_000)
else:
    write_weights(stored, model, 1000, encoder, target, 400_000_000)
print(before, peak())
"""
CONSTANT_MIB = 160  # a few parts of 16 MiB, and what the libraries allocate at first use


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["plain", "int8", "int4", "own", "own, bf16"])
def test_peak_memory_of_the_writer_on_a_gigabyte(tmp_path: Path, scheme: str) -> None:
    from largeformer.config.schema import ModelConfig

    # The matrices of queries, keys and values are the largest, and are cut in three: 201 MB each, 1.3 GB in all.
    shape = {"num_layers": 4, "hidden_size": 4096, "ffn_hidden_size": 1024, "num_attention_heads": 32, "seq_length": 64}
    model = ModelConfig.model_validate(shape)
    weights = tmp_path / "weights"
    weights.mkdir()
    largest = _write_random(model, 1000, weights)
    assert sum(path.stat().st_size for path in weights.iterdir()) > 10**9
    target = tmp_path / "made"
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(weights), str(target), scheme, model.model_dump_json()],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "/usr/bin", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    grown = (after - before) * 1024
    print(f"{scheme}: {grown / 2**20:.0f} MiB over {largest / 2**20:.0f} MiB, the largest tensor")
    assert grown <= 1.3 * largest + CONSTANT_MIB * 2**20


def _write_random(model: object, vocab_size: int, folder: Path) -> int:
    """A checkpoint of random weights under our names, one file for each tensor. Returns the bytes of the largest."""
    from largeformer.models.hf_mapping import rows, shapes

    table = rows(model, "llama")  # type: ignore[arg-type]
    theirs = shapes(table, model, vocab_size)  # type: ignore[arg-type]
    largest = 0
    for number, row in enumerate(table):
        columns = theirs[next(iter(row.theirs))][1:]
        tensor = torch.randn(sum(theirs[name][0] for name in row.theirs), *columns) * 0.02
        save_file({row.ours: tensor}, folder / f"{number}.safetensors")
        largest = max(largest, tensor.numel() * 4)
    return largest
