"""Hostfiles: what the deepspeed launcher reads, read alike; what would fail in it, told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from largeformer import cli
from largeformer.errors import BadInputError
from largeformer.launching.hostfile import read_hostfile

ROOT = Path(__file__).parents[2]


def test_it_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text("# two\n127.0.0.3 slots=2\n\nlocalhost   slots=1\n")
    assert read_hostfile(path) == dict(fetch_hostfile(str(path))) == {"127.0.0.3": 2, "localhost": 1}


def test_the_example_is_one(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text((ROOT / "launch" / "hostfile.example").read_text().replace("node", "127.0.0."))
    assert read_hostfile(path) == {"127.0.0.1": 8, "127.0.0.2": 8}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        pytest.param("no-such-host.invalid slots=2\n", "no-such-host.invalid is unknown here", id="unknown host"),
        pytest.param("127.0.0.1 slots=0\n", "127.0.0.1 has slots=0; give the number of its GPUs", id="zero slots"),
        pytest.param("127.0.0.1 slots=-1\n", "has slots=-1", id="negative slots"),
        pytest.param("127.0.0.1 slots=1\n127.0.0.1 slots=2\n", "line 2: 127.0.0.1 stands twice", id="twice"),
        pytest.param("127.0.0.1\n", "'127.0.0.1' is not of the form 'HOST slots=N'", id="no slots"),
        pytest.param("# nobody\n", "names no host", id="empty"),
        pytest.param("\udcff", "cannot be read", id="garbage"),
    ],
)
def test_what_is_wrong_is_named(text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInputError) as caught:
        read_hostfile(path)
    assert sentence in str(caught.value) and len(caught.value.problems) == 1
    assert cli.main(["doctor", "--hostfile", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_name_of_ssh_alone_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host near far.invalid\n  HostName 127.0.0.1\n")
    (tmp_path / "hostfile").write_text("far.invalid slots=1\n")
    assert read_hostfile(tmp_path / "hostfile") == {"far.invalid": 1}
