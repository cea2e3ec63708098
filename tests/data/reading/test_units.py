"""Units of work: nothing is lost or doubled at a border, whatever the compression, and any unit may be the first one read."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from largeformer.data.reading import streams
from largeformer.data.reading import units as units_module
from largeformer.data.reading.sources import SourceFile
from largeformer.data.reading.streams import Stream
from largeformer.data.reading.text import Block, Document, Rejected, read_block
from largeformer.data.reading.units import Cursor, Unit, read_units, unit_bytes

KIB = 1024


def zstd_in_frames(content: bytes) -> bytes:
    """Two frames, as tools that append to a file write them."""
    half = len(content) // 2
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".zst": zstd_in_frames,
}


def prose(size: int) -> bytes:
    draw = random.Random(size)
    words = ["line", "naïve", "犬も歩けば", "x" * 90, "\r", "\t"]
    text = ""
    while len(text) < size:
        text += " ".join(draw.choices(words, k=draw.randint(0, 9))) + "\n" * draw.choice([1, 1, 1, 2])
    return text.encode()


def rows(count: int) -> bytes:
    return "\n".join(json.dumps({"text": f"row {i} " + "y" * (i % 97)}, ensure_ascii=False) for i in range(count)).encode()


def files(folder: Path, ending: str, contents: dict[str, bytes]) -> list[SourceFile]:
    found = []
    for name, content in contents.items():
        path = folder / f"{name}{ending}"
        path.write_bytes(FORMS[ending](content))
        found.append(SourceFile(path, path.name))
    return found


def blocks(units: list[Unit]) -> list[Block]:
    return [item for unit in units for item in unit.items if isinstance(item, Block)]


@pytest.mark.parametrize("ending", FORMS)
def test_blocks_joined_are_the_files_and_know_their_lines(tmp_path: Path, ending: str) -> None:
    contents = {"a.txt": prose(70 * KIB), "b.jsonl": rows(900), "c.txt": b"", "d.txt": b"one line", "e.txt": prose(9 * KIB)}
    units = list(read_units(files(tmp_path, ending, contents), 16 * KIB, 2**15))
    assert [unit.number for unit in units] == list(range(len(units))) and len(units) > 4
    for name, content in contents.items():
        mine = [block for block in blocks(units) if block.file == f"{name}{ending}"]
        assert b"".join(block.content for block in mine) == content
        lines = 1
        for block in mine:
            assert block.line == lines
            lines += block.content.count(b"\n")
    assert all(block.content.endswith(b"\n") for block in blocks(units)[:4])


@pytest.mark.parametrize("ending", FORMS)
def test_reading_goes_on_from_the_end_of_any_unit(tmp_path: Path, ending: str) -> None:
    contents = {"a.txt": prose(70 * KIB), "b.jsonl": rows(900), "c.jsonl": b'{"text": "no end of line"}', "d.jsonl": b"x" * 90_000}
    source = files(tmp_path, ending, contents)
    units = list(read_units(source, 16 * KIB, 2**15))
    for i, unit in enumerate(units):
        rest = list(read_units(source, 16 * KIB, 2**15, unit.end, i + 1))
        assert [(u.number, u.items, u.end) for u in rest] == [(u.number, u.items, u.end) for u in units[i + 1 :]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.txt.gz", "cut.jsonl.gz", "cut.txt.gz", "cut.txt.zst"])
def test_what_is_read_at_once_decides_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows about as long as is allowed, lines, and files that break off: who goes on from a unit's end reads at other places."""
    for module, sizes in ((streams, {"_READ": 16, "_ZSTD_READ": 8}), (units_module, {"_STEP": 32, "_SEARCHED": 20})):
        for key, size in sizes.items():
            monkeypatch.setattr(module, key, size)
    source = [SourceFile(tmp_path / name, name)]
    ending = source[0].path.suffix if source[0].compression else ""
    for seed in range(60):
        draw = random.Random(seed)
        lengths = draw.choices([0, 1, 5, 20, 60, 63, 64, 65, 90, 100, 110, 120, 130, 140, 200, 300], k=draw.randint(1, 12))
        content = FORMS[ending](b"".join(draw.randbytes(length).hex().encode()[:length] + b"\n" for length in lengths))
        source[0].path.write_bytes(content[: -draw.randint(1, 30)] if name.startswith("cut") else content)
        limit = draw.choice([40, 100, 150])
        units = list(read_units(source, 64, limit))
        for i, unit in enumerate(units):
            rest = list(read_units(source, 64, limit, unit.end, i + 1))
            assert [(u.number, u.items, u.end) for u in rest] == [(u.number, u.items, u.end) for u in units[i + 1 :]], seed


def test_a_file_is_cut_alike_whatever_stands_before_it(tmp_path: Path) -> None:
    source = files(tmp_path, "", {"a.txt": prose(50 * KIB), "b.txt": prose(70 * KIB)})
    together = [block for block in blocks(list(read_units(source, 16 * KIB, 2**15))) if block.file == "b.txt"]
    assert together == blocks(list(read_units(source[1:], 16 * KIB, 2**15)))


def test_text_is_cut_at_a_blank_line_and_without_one_at_a_line_or_a_character(tmp_path: Path) -> None:
    cases = {"blank.txt": b"a\n\nbb\n \t\ncc\ndd" * 4, "lines.txt": b"abc\n" * 20, "none.txt": "日".encode() * 20}
    for name, content in cases.items():
        found = blocks(list(read_units(files(tmp_path, "", {name: content}), 16, 2**15)))
        assert b"".join(block.content for block in found) == content
        endings = {block.content[-2:] for block in found[:-1]}
        assert endings <= {"blank.txt": {b"\n\n", b"\t\n"}, "lines.txt": {b"c\n"}, "none.txt": {"日".encode()[-2:]}}[name]


def test_a_row_of_any_length_costs_no_memory_and_is_rejected(tmp_path: Path) -> None:
    long = b'{"text": "' + b"z" * 5_000_000 + b'"}'
    content = b'{"text": "before"}\n' + long + b'\n{"text": "after"}\n' + long
    units = list(read_units(files(tmp_path, "", {"a.jsonl": content}), 16 * KIB, 2**15))
    assert max(len(block.content) for block in blocks(units)) < 100 * KIB
    found = [
        found
        for unit in units
        for item in unit.items
        for found in ([item] if isinstance(item, Rejected) else read_block(item, "text", 2**15))
    ]
    assert [(type(item), item.line) for item in found] == [(Document, 1), (Rejected, 2), (Document, 3), (Rejected, 4)]
    assert isinstance(found[1], Rejected) and found[1].reason == "longer than data.max_document_bytes 32768"


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_a_broken_stream_keeps_what_came_before(tmp_path: Path, ending: str, damage: str) -> None:
    content = "".join(json.dumps({"text": f"row {i} {i * i * 7919 % 10007} {i**3}"}) + "\n" for i in range(9000)).encode()
    packed = FORMS[ending](content)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[:-2000] if damage == "cut" else packed[:-2000] + b"\x00\xff" * 1000)
    units = list(read_units([SourceFile(path, "a"), *files(tmp_path, "", {"b.jsonl": rows(3)})], 16 * KIB, 2**15))
    items = [item for unit in units for item in unit.items]
    (broken,) = [item for item in items if isinstance(item, Rejected)]
    before = b"".join(item.content for item in items if isinstance(item, Block) and item.file == "a")
    assert before.endswith(b"\n") and len(before) > len(content) // 3
    sure = len(before) if damage == "cut" else len(content) // 2  # gzip hands out what it makes of noise, until its checksum
    assert before[:sure] == content[:sure]
    assert broken.line == before.count(b"\n") + 1 and f"broken {'gzip' if ending == '.gz' else 'zstd'} stream" in broken.reason
    assert items[-1] == Block("b.jsonl", 1, rows(3), True)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_broken_stream_keeps_the_rows_behind_one_that_is_longer_than_a_block(tmp_path: Path, ending: str) -> None:
    """Looking for the end of the long row runs into the break."""
    draw = random.Random(1)
    lines = [json.dumps({"text": "".join(draw.choices("abcdefgh ", k=length))}) for length in (150 * KIB, *[400] * 400)]
    packed = FORMS[ending]("".join(f"{line}\n" for line in lines).encode())
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: int(len(packed) * 0.95)])
    source = [SourceFile(path, "a")]
    stream = Stream(source[0])
    stream.fill(2**30)
    whole = stream.take(stream.buffer.rfind(b"\n") + 1)
    units = list(read_units(source, 16 * KIB, 256 * KIB))
    *kept, broken = [item for unit in units for item in unit.items]
    assert whole.count(b"\n") > 100
    assert b"".join(item.content for item in kept if isinstance(item, Block)) == whole
    assert isinstance(broken, Rejected) and broken.line == whole.count(b"\n") + 1 and "broken" in broken.reason
    for i, unit in enumerate(units):
        rest = list(read_units(source, 16 * KIB, 256 * KIB, unit.end, i + 1))
        assert [(u.number, u.items, u.end) for u in rest] == [(u.number, u.items, u.end) for u in units[i + 1 :]]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    source = files(tmp_path, "", {"a.jsonl": b'\xef\xbb\xbf{"text": "a"}\n'})
    (block,) = blocks(list(read_units(source, KIB, 2**15)))
    assert list(read_block(block, "text", 2**15)) == [Document("a", "a.jsonl", 1)]


def test_units_grow_with_the_corpus_within_bounds() -> None:
    assert [unit_bytes(size) for size in (0, 200 * 10**6, 2**33, 2**40)] == [2**20, 2**20, 2**21, 2**25]
    assert list(read_units([], KIB, KIB)) == []
    assert Cursor() == Cursor(0, 0, 1)
