"""Blocks of global tensors to safetensors files and back, at any cut. PyTorch's reader and the safetensors library agree."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from largeformer.checkpoint.format import Block, Place, ShardWriter, Tensors, read_headers, write_blocks
from largeformer.checkpoint.manifest import DamagedError, Digest
from largeformer.errors import BadInputError

Cuts = dict[str, tuple[int, ...]]
"""Name -> how many pieces along each dimension; a rank takes every world-th piece."""

DTYPES = {"matrix": torch.float32, "half": torch.bfloat16, "vector": torch.float32, "small": torch.float16}
SHAPES = {"matrix": (12, 8), "half": (6, 4), "vector": (24,), "small": (2, 2)}


def whole(name: str) -> torch.Tensor:
    shape = SHAPES[name]
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return values.to(DTYPES[name])


def part_of(values: torch.Tensor, block: Block) -> torch.Tensor:
    return values[tuple(slice(o, o + n) for o, n in zip(block.offset, block.tensor.shape, strict=True))]


def pieces(name: str, counts: tuple[int, ...], fill: bool) -> list[Block]:
    """All blocks of a tensor cut into `counts`; filled with its values, or with NaN, which a read must replace."""
    values = whole(name) if fill else torch.full_like(whole(name), torch.nan)
    sizes = [length // count for length, count in zip(values.shape, counts, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(count) for count in counts)).reshape(-1, len(counts)).tolist()
    blocks = []
    for place in places:
        offset = tuple(index * size for index, size in zip(place, sizes, strict=True))
        view = values[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))]
        blocks.append(Block(name, view, offset, tuple(values.shape)))
    return blocks


def every(cuts: Cuts, fill: bool) -> list[Block]:
    return [block for name, counts in cuts.items() for block in pieces(name, counts, fill)]


def write(folder: Path, cuts: Cuts, ranks: int) -> list[str]:
    """One file a rank; their names."""
    for rank in range(ranks):
        write_blocks(folder / f"rank{rank}.safetensors", every(cuts, fill=True)[rank::ranks])
    return sorted(path.name for path in folder.iterdir())


def opened(folder: Path) -> Tensors:
    return Tensors(folder, read_headers(folder, sorted(path.name for path in folder.glob("*.safetensors"))))


UNCUT: Cuts = {"matrix": (1, 1), "half": (1, 1), "vector": (1,), "small": (1, 1)}
ROWS: Cuts = {"matrix": (2, 1), "half": (2, 1), "vector": (2,), "small": (2, 1)}
COLUMNS: Cuts = {"matrix": (1, 2), "half": (1, 2), "vector": (2,), "small": (1, 2)}
SIX: Cuts = {"matrix": (3, 2), "half": (3, 2), "vector": (6,), "small": (2, 2)}
WRITERS: dict[str, tuple[Cuts, int]] = {
    "one rank": (UNCUT, 1),
    "rows over two ranks": (ROWS, 2),
    "columns over two ranks": (COLUMNS, 2),
    "whole tensors over two ranks": (UNCUT, 2),
    "six blocks over six ranks": (SIX, 6),
}
READERS = {"whole": UNCUT, "rows": ROWS, "columns": COLUMNS, "six blocks": SIX}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_any_cut_reads_any_other(tmp_path: Path, writer: str, reader: str) -> None:
    write(tmp_path, *WRITERS[writer])
    blocks = every(READERS[reader], fill=False)
    opened(tmp_path).read(blocks)
    for block in blocks:
        assert torch.equal(block.tensor, part_of(whole(block.name), block)), block.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reads_into_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    write(tmp_path, ROWS, 2)
    target = torch.zeros(12, 8, dtype=dtype)
    opened(tmp_path).read([Block("matrix", target, (0, 0), (12, 8))])
    assert torch.equal(target, whole("matrix").to(dtype))


def test_files_are_plain_safetensors(tmp_path: Path) -> None:
    """Any tool opens them: one file a rank, each tensor by its name."""
    halves = [load_file(tmp_path / name) for name in write(tmp_path, ROWS, 2)]
    for name in SHAPES:
        assert torch.equal(torch.cat([half[name] for half in halves]), whole(name))


@pytest.mark.parametrize("writer", WRITERS)
def test_pytorchs_distributed_checkpoint_reads_them(tmp_path: Path, writer: str) -> None:
    write(tmp_path, *WRITERS[writer])
    state = {name: torch.full_like(whole(name), torch.nan) for name in SHAPES}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in state.items():
        assert torch.equal(tensor, whole(name)), name


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    save_file({name: whole(name) for name in SHAPES}, tmp_path / "model.safetensors")
    held = opened(tmp_path)
    assert {place.name: held.whole(place).tolist() for place in held} == {name: whole(name).tolist() for name in SHAPES}


def test_digest_is_of_the_file(tmp_path: Path) -> None:
    """Larger than what is hashed at once."""
    tensor = torch.arange(5 << 20, dtype=torch.float32)
    digest = write_blocks(tmp_path / "a", [Block("large", tensor, (0,), tuple(tensor.shape)), *pieces("half", (1, 1), fill=True)])
    assert digest == Digest.of((tmp_path / "a").read_bytes())
    assert torch.equal(load_file(tmp_path / "a")["large"], tensor)


def test_two_blocks_of_a_tensor_in_one_file_are_refused(tmp_path: Path) -> None:
    """A safetensors file holds one tensor of a name: the second block would take the first one's place."""
    with pytest.raises(AssertionError, match="keep only the last"):
        write(tmp_path, ROWS, 1)


def test_a_writer_takes_what_it_was_told(tmp_path: Path) -> None:
    place = Place("matrix", (2, 2), torch.float32, (0, 0), (2, 2))
    with pytest.raises(AssertionError, match="matrix is not what the header says"):
        ShardWriter(tmp_path / "a", [place]).append(torch.zeros(2, 3))
    with pytest.raises(AssertionError, match="never came"):
        ShardWriter(tmp_path / "b", [place]).close()


@dataclass(frozen=True)
class Refusal:
    """A block that is asked for, and what the sentence says of it."""

    block: Block
    says: Sequence[str]


REFUSALS: dict[str, Refusal] = {
    "no such tensor": Refusal(Block("other", torch.zeros(2), (0,), (2,)), ["other", "absent"]),
    "another shape": Refusal(Block("matrix", torch.zeros(8, 8), (0, 0), (8, 8)), ["matrix", "[8, 8]", "[12, 8]"]),
    "another rank": Refusal(Block("vector", torch.zeros(24, 1), (0, 0), (24, 1)), ["vector", "[24, 1]", "[24]"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_there_is_refused_by_name(tmp_path: Path, name: str) -> None:
    write(tmp_path, UNCUT, 1)
    with pytest.raises(BadInputError) as caught:
        opened(tmp_path).read([*pieces("half", (1, 1), fill=False), REFUSALS[name].block])
    for part in (str(tmp_path), *REFUSALS[name].says):
        assert part in str(caught.value)


def test_a_lost_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / write(tmp_path, ROWS, 2)[1]).unlink()
    with pytest.raises(BadInputError, match="matrix"):
        opened(tmp_path).read(pieces("matrix", (1, 1), fill=False))


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def tensor_entry(**changed: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}}


MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "no header": b"\x01\x02",
    "header longer than the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "header is no JSON": header(b"\x80\x04..."),
    "header is a list": header([1, 2]),
    "deeply nested": header(b"[" * 100_000),
    "no such dtype": header(tensor_entry(dtype="OBJECT")) + bytes(8),
    "more elements than bytes": header(tensor_entry(shape=[3])) + bytes(8),
    "beyond the end": header(tensor_entry(data_offsets=[8, 16])) + bytes(8),
    "before the beginning": header(tensor_entry(data_offsets=[-8, 0])) + bytes(8),
    "negative shape": header(tensor_entry(shape=[-1, -2])) + bytes(8),
    "outside its tensor": header(
        {**tensor_entry(), "__metadata__": {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [1], "global_shape": [2]}})}}
    )
    + bytes(8),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DamagedError, match=r"a\.safetensors is no safetensors file"):
        opened(tmp_path)


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Bomb(trace)))
    with pytest.raises(DamagedError):
        opened(tmp_path)
    assert not trace.exists()
    pickle.loads((tmp_path / "a.safetensors").read_bytes())
    assert trace.exists(), "the bomb works"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, UNCUT, 1)
    held, path = opened(tmp_path), tmp_path / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedError, match="ends before its tensors do"):
        held.read(every(UNCUT, fill=False))
