from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from largeformer.data.preparation import duplicates
from largeformer.data.preparation.duplicates import FirstOfEqual


@pytest.mark.parametrize("held", [1, 100, 10**6])
def test_only_the_first_of_equal_digests_stays(tmp_path: Path, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_HELD", held)
    draw = np.random.default_rng(0)
    # Half are repeated; two share eight bytes and are not equal.
    numbers = draw.integers(0, 700, 1500).tolist()
    digests = [hashlib.md5(str(number).encode()).digest() for number in numbers]
    digests += [b"\0" * 16, b"\0" * 8 + b"\1" * 8, b"\1" * 8 + b"\0" * 8, b"\0" * 16]
    first = FirstOfEqual(tmp_path / "work")
    for chunk in np.array_split(np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 16), 7):
        first.add(chunk)
    first.finish()
    seen: set[bytes] = set()
    expected = [digest not in seen and not seen.add(digest) for digest in digests]  # type: ignore[func-returns-value]
    assert first.is_first(0, len(digests)).tolist() == expected
    assert first.is_first(100, 7).tolist() == expected[100:107]


def test_nothing_has_no_duplicates(tmp_path: Path) -> None:
    first = FirstOfEqual(tmp_path / "work")
    first.add(np.empty((0, 16), dtype=np.uint8))
    first.finish()
    assert first.is_first(0, 0).tolist() == []
