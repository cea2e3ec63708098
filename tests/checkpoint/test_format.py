"""Blocks of global tensors to files and back, at any cut; and folders that are a checkpoint or are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from largeformer.checkpoint.commit import committed, locate, new_checkpoint, newest, step_of
from largeformer.checkpoint.format import Block, read_blocks, write_blocks
from largeformer.checkpoint.retention import drop_old
from largeformer.errors import BadInputError
from tests.distributed import RankContext, RankPool

Ranks = Callable[[int], RankPool]
Cuts = dict[str, tuple[int, ...]]
"""Name -> how many pieces along each dimension; a rank takes every world-th piece."""

DTYPES = {"matrix": torch.float32, "half": torch.bfloat16, "vector": torch.float32, "small": torch.float16}
SHAPES = {"matrix": (12, 8), "half": (6, 4), "vector": (24,), "small": (2, 2)}


def whole(name: str) -> torch.Tensor:
    shape = SHAPES[name]
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    return values.to(DTYPES[name])


def pieces(name: str, counts: tuple[int, ...], fill: bool) -> list[Block]:
    """All blocks of a tensor cut into `counts`; filled with its values, or with NaN, which a read must replace."""
    values = whole(name) if fill else torch.full_like(whole(name), torch.nan)
    sizes = [length // count for length, count in zip(values.shape, counts, strict=True)]
    places = torch.cartesian_prod(*(torch.arange(count) for count in counts)).reshape(-1, len(counts)).tolist()
    blocks = []
    for place in places:
        offset = tuple(index * size for index, size in zip(place, sizes, strict=True))
        view = values[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))]
        blocks.append(Block(name, view.clone(), offset, tuple(values.shape)))
    return blocks


def share(ranks: RankContext, cuts: Cuts, fill: bool) -> list[Block]:
    every = [block for name, counts in cuts.items() for block in pieces(name, counts, fill)]
    return every[ranks.rank :: ranks.world_size]


def write(ranks: RankContext, folder: Path, cuts: Cuts) -> None:
    write_blocks(folder, share(ranks, cuts, fill=True))


def read(ranks: RankContext, folder: Path, cuts: Cuts) -> list[tuple[str, bool]]:
    """Name of each block that this rank asked for, and whether it got the values."""
    blocks = share(ranks, cuts, fill=False)
    read_blocks(folder, blocks)
    found = []
    for block in blocks:
        expected = whole(block.name)[tuple(slice(o, o + n) for o, n in zip(block.offset, block.tensor.shape, strict=True))]
        found.append((block.name, torch.equal(block.tensor, expected)))
    return found


UNCUT: Cuts = {"matrix": (1, 1), "half": (1, 1), "vector": (1,), "small": (1, 1)}
ROWS: Cuts = {"matrix": (2, 1), "half": (2, 1), "vector": (2,), "small": (2, 1)}
SIX: Cuts = {"matrix": (3, 2), "half": (3, 2), "vector": (6,), "small": (2, 2)}
CUTS: dict[str, tuple[int, Cuts]] = {
    "one process": (1, UNCUT),
    "rows over two ranks": (2, ROWS),
    "columns over two ranks": (2, {"matrix": (1, 2), "half": (1, 2), "vector": (2,), "small": (1, 2)}),
    "whole tensors over two ranks": (2, UNCUT),
}


READERS = {**CUTS, "six blocks over one rank": (1, SIX), "six blocks over two ranks": (2, SIX)}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("writer", CUTS)
def test_any_cut_reads_any_other(ranks: Ranks, tmp_path: Path, writer: str, reader: str) -> None:
    ranks(CUTS[writer][0]).run(write, tmp_path, CUTS[writer][1])
    world_size, cuts = READERS[reader]
    found = [entry for rank in ranks(world_size).run(read, tmp_path, cuts) for entry in rank]
    assert sorted(found) == sorted((name, True) for name, counts in cuts.items() for _ in range(torch.Size(counts).numel()))


def test_files_are_plain_safetensors(ranks: Ranks, tmp_path: Path) -> None:
    """Any tool opens them: one file a rank, each tensor by its name."""
    ranks(2).run(write, tmp_path, ROWS)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    halves = [load_file(file) for file in files]
    for name in SHAPES:
        assert torch.equal(torch.cat([half[name] for half in halves]), whole(name))


def test_two_blocks_of_a_tensor_in_one_file_are_refused(tmp_path: Path) -> None:
    """A safetensors file holds one tensor of a name: the second block would take the first one's place."""
    with pytest.raises(AssertionError, match="keep only the last"):
        write(RankContext(0, 1), tmp_path, ROWS)


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


def refused(ranks: RankContext, folder: Path, blocks: Sequence[Block]) -> str:
    with pytest.raises(BadInputError) as caught:
        read_blocks(folder, blocks)
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_there_is_refused_by_name(ranks: Ranks, tmp_path: Path, name: str, world_size: int) -> None:
    ranks(world_size).run(write, tmp_path, UNCUT)
    refusal = REFUSALS[name]
    for message in ranks(world_size).run(refused, tmp_path, [*pieces("half", (1, 1), fill=False), refusal.block]):
        assert str(tmp_path) in message
        for part in refusal.says:
            assert part in message


def one_rank_refused(ranks: RankContext, folder: Path) -> str:
    return refused(ranks, folder, [REFUSALS["no such tensor"].block] if ranks.rank == 1 else pieces("matrix", (1, 1), fill=False))


def test_all_ranks_hear_of_what_one_misses(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(write, tmp_path, UNCUT)
    for message in ranks(2).run(one_rank_refused, tmp_path):
        assert "does not hold other" in message


def test_a_lost_file_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(write, tmp_path, ROWS)
    sorted(tmp_path.iterdir())[1].unlink()
    message = ranks(1).run(refused, tmp_path, pieces("matrix", (1, 1), fill=False))[0]
    assert "matrix" in message


def test_without_a_process_group(tmp_path: Path) -> None:
    """Tools read checkpoints in a process that has joined no world."""
    assert not dist.is_initialized()
    alone = RankContext(0, 1)
    write(alone, tmp_path, UNCUT)
    assert all(right for _, right in read(alone, tmp_path, SIX))
    assert "absent" in refused(alone, tmp_path, [REFUSALS["no such tensor"].block])


def save(ranks: RankContext, folder: Path, step: int) -> None:
    with new_checkpoint(folder, step) as path:
        (path / f"rank{ranks.rank}").write_text(str(step))


def fail_half_way(ranks: RankContext, folder: Path, step: int) -> None:
    with pytest.raises(OSError, match="disk full"), new_checkpoint(folder, step) as path:
        (path / "half").touch()
        raise OSError("disk full")


def test_a_checkpoint_is_complete_or_not_there(ranks: Ranks, tmp_path: Path) -> None:
    pool = ranks(2)
    assert newest(tmp_path) is None
    pool.run(save, tmp_path, 100)
    pool.run(fail_half_way, tmp_path, 200)
    assert (tmp_path / "step_00000200.tmp" / "half").exists()
    assert [step_of(path) for path in committed(tmp_path)] == [100]
    assert (tmp_path / "latest").read_text() == "step_00000100\n"
    pool.run(save, tmp_path, 200)
    assert [step_of(path) for path in committed(tmp_path)] == [100, 200]
    assert sorted(path.name for path in (tmp_path / "step_00000200").iterdir()) == ["rank0", "rank1"]
    assert (tmp_path / "latest").read_text() == "step_00000200\n"
    assert not list(tmp_path.glob("*.tmp"))
    pool.run(save, tmp_path, 200)  # saved again after a resume: replaced
    assert (tmp_path / "step_00000200" / "rank1").read_text() == "200"


@pytest.mark.parametrize(("keep", "kept"), [(1, [11]), (2, [9, 11]), (3, [8, 9, 11]), (9, [8, 9, 11])])
def test_retention_keeps_the_newest(tmp_path: Path, keep: int, kept: list[int]) -> None:
    for step in (9, 11, 8):
        save(RankContext(0, 1), tmp_path, step)
    (tmp_path / "step_00000007.tmp").mkdir()
    deleted = drop_old(tmp_path, keep)
    assert [step_of(path) for path in committed(tmp_path)] == kept
    assert len(deleted) == 3 - len(kept) and not any(path.exists() for path in deleted)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["step_00000007.tmp"]


# What the user names, below the run's folder -> the checkpoint that is meant.
NAMED = {
    "": "pretrain/checkpoints/step_00000020",
    "pretrain": "pretrain/checkpoints/step_00000020",
    "pretrain/checkpoints": "pretrain/checkpoints/step_00000020",
    "pretrain/checkpoints/step_00000010": "pretrain/checkpoints/step_00000010",
}


@pytest.mark.parametrize("named", NAMED)
def test_locate(tmp_path: Path, named: str) -> None:
    folder = tmp_path / "pretrain" / "checkpoints"
    for step in (10, 20):
        save(RankContext(0, 1), folder, step)
    (folder / "step_00000030.tmp").mkdir()
    (folder / "step_40").mkdir()
    (folder / "step_00000050").touch()
    assert locate(tmp_path / named) == tmp_path / NAMED[named]


@pytest.mark.parametrize("named", ["", "nowhere", "prepare", "prepare/step_00000030.tmp"])
def test_locate_nothing(tmp_path: Path, named: str) -> None:
    (tmp_path / "prepare" / "step_00000030.tmp").mkdir(parents=True)
    with pytest.raises(BadInputError, match="holds no checkpoint: name a run"):
        locate(tmp_path / named)
