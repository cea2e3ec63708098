"""`launch/environment.sh`: what it installs and when, and what it says is missing. The Python is a stand-in that notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_TOOLS = ("bash", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "tail")
_PYTHON = f"""#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python" ;;
    "-m pip"*install*) echo "what pip says"; exit "${{PIP_ENDS:-0}}" ;;
    "-m pip"*) exit 0 ;;
    *sys.executable*) echo "$0" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with what the script reads, and PATH of no more than it needs."""
    root, programs = tmp_path / "clone", tmp_path / "bin"
    (root / "launch").mkdir(parents=True)
    for name in ("launch/environment.sh", "launch/constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    programs.mkdir()
    for tool in _TOOLS:
        (programs / tool).symlink_to(str(shutil.which(tool)))
    for name, text in (("python3.11", _PYTHON), ("c++", "#!/bin/bash\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return root


def prepare(clone: Path, **environ: str) -> tuple[int, list[str], str]:
    """Exit code, the installations that were asked for, and what was said."""
    calls = clone.parent / "calls"
    calls.unlink(missing_ok=True)
    told = {"PATH": str(clone.parent / "bin"), "CALLS": str(calls), "HOME": str(clone), **environ}
    command = "source launch/environment.sh && prepare_environment"
    done = subprocess.run([str(shutil.which("bash")), "-c", command], cwd=clone, env=told, capture_output=True, text=True)
    asked = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, [call.partition("--progress-bar off ")[2] for call in asked if " install " in call], done.stdout + done.stderr


def everything(clone: Path, torch: str = "torch==2.13.0") -> list[str]:
    return [torch, f"-c {clone}/launch/constraints.txt -e {clone}[test]"]


def test_a_second_call_installs_nothing(clone: Path) -> None:
    assert prepare(clone)[:2] == (0, everything(clone))
    assert prepare(clone)[:2] == (0, [])


def test_what_changes_is_installed_again(clone: Path) -> None:
    prepare(clone)
    with (clone / "launch" / "constraints.txt").open("a") as constraints:
        constraints.write("numpy==2.0\n")
    assert prepare(clone)[1] == everything(clone)
    of_cuda = {"LARGEFORMER_TORCH": "2.11.0", "LARGEFORMER_TORCH_INDEX": "https://packages.example/cuda"}
    assert prepare(clone, **of_cuda)[1] == everything(clone, "torch==2.11.0 --index-url https://packages.example/cuda")
    assert prepare(clone, **of_cuda)[1] == []


def test_what_failed_is_told_and_done_again(clone: Path) -> None:
    code, asked, said = prepare(clone, PIP_ENDS="1")
    assert code != 0 and asked == everything(clone)[:1]
    assert "what pip says" in said and "installing torch 2.13.0 failed; the whole log is" in said
    code, asked, said = prepare(clone)
    assert (code, asked) == (0, everything(clone)) and "completing it" in said


MISSING = {
    "c++": "no C++ compiler is here (looked for $CXX, c++, g++, clang++)",
    "python3.11": "no Python 3.11 or newer is here (looked for python3.11, python3.12, python3.13, python3)",
}


@pytest.mark.parametrize("program", MISSING)
def test_what_is_missing_is_told_with_how_to_get_it(clone: Path, program: str) -> None:
    os.remove(clone.parent / "bin" / program)
    code, asked, said = prepare(clone)
    assert code != 0 and asked == []
    assert MISSING[program] in said and "sudo apt-get install" in said and "conda create" in said


def test_a_python_that_was_named_must_run(clone: Path) -> None:
    code, _, said = prepare(clone, LARGEFORMER_PYTHON="python2")
    assert code != 0 and "LARGEFORMER_PYTHON=python2 is not a Python 3.11 or newer that runs; name another, or unset it" in said
