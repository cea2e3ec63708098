"""Local ranks: what each is told, whose exit code counts, who is ended, whose last words are shown.

`spawn` runs `python -m largeformer`; a stand-in package of that name in the working folder shows what a rank sees.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from largeformer.errors import BadInputError
from largeformer.launching import local
from largeformer.launching.local import free_port, spawn
from largeformer.parallel.environment import discover

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder whose `largeformer` executes the Python that it is given as its argument."""
    (tmp_path / "largeformer").mkdir()
    (tmp_path / "largeformer" / "__main__.py").write_text("import os, sys\nrank = int(os.environ['RANK'])\nexec(sys.argv[1])\n")
    (tmp_path / "largeformer" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_each_rank_knows_its_place(stand_in: Path) -> None:
    script = "open(f'rank{rank}', 'w').write('\\n'.join(f'{k}={v}' for k, v in os.environ.items() if chr(10) not in v))"
    assert spawn(3, [script], env={"PATH": os.environ["PATH"]}) == 0
    told = [dict(line.split("=", 1) for line in (stand_in / f"rank{rank}").read_text().splitlines()) for rank in range(3)]
    infos = [discover(environ) for environ in told]
    assert [(info.rank, info.local_rank, info.world_size, info.local_world_size) for info in infos] == [(r, r, 3, 3) for r in range(3)]
    assert len({(info.master_addr, info.master_port) for info in infos}) == 1
    assert infos[0].master_port > 0
    assert {environ["OMP_NUM_THREADS"] for environ in told} == {str(max(1, len(os.sched_getaffinity(0)) // 3))}


def test_what_the_caller_sets_stands(stand_in: Path) -> None:
    script = "sys.exit(int(os.environ['OMP_NUM_THREADS'] != '7'))"
    assert spawn(1, [script], env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "7"}) == 0


WAIT = "__import__('signal').pause()"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        pytest.param("pass", 0, None, id="all well"),
        pytest.param(f"sys.exit('no such tensor') if rank == 1 else {WAIT}", 1, "[rank 1] no such tensor", id="one fails, the other waits"),
        pytest.param(f"sys.exit(3) if rank == 0 else {WAIT}", 3, None, id="rank 0 fails: its output is on the terminal"),
        pytest.param(f"os.kill(os.getpid(), 9) if rank == 1 else {WAIT}", 137, "rank 1 failed first, with exit code 137", id="killed"),
        pytest.param(
            f"__import__('signal').signal(15, lambda *_: None); sys.exit(4) if rank == 1 else [{WAIT} for _ in 'ab']",
            4,
            "rank 1 failed first",
            id="the other ignores SIGTERM",
        ),
        pytest.param("sys.exit(75)", 75, None, id="all stop after saving"),
        pytest.param("sys.exit(75 if rank else 0)", 75, None, id="one stops after saving"),
    ],
)
def test_exit_code_and_last_words(
    stand_in: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str, code: int, words: str | None
) -> None:
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    monkeypatch.setattr(local, "TERMINATE_S", 0.5)
    assert spawn(2, [script]) == code
    error = capfd.readouterr().err
    assert (words in error) if words else ("failed first" not in error)


def test_only_rank_0_is_heard(stand_in: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn(3, ["print('I am', rank)"]) == 0
    assert capfd.readouterr().out == "I am 0\n"


def test_rank_0_has_time_to_speak_after_another_failed(stand_in: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Bad input fails on every rank, and only rank 0 says why: it is not ended before it has."""
    script = "(rank == 0 and (__import__('threading').Event().wait(0.5), print('the recipe is wrong', flush=True))); sys.exit(2)"
    assert spawn(2, [script]) == 2
    assert "the recipe is wrong" in capfd.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_signals_reach_every_rank_once(stand_in: Path, number: signal.Signals) -> None:
    rank_script = textwrap.dedent(f"""
        import select, signal
        count = [0]
        def stop(*_):
            count[0] += 1
            open(f'stopped{{rank}}', 'w').write(str(count[0]))
            sys.exit(75)
        signal.signal({int(number)}, stop)
        open(f'ready{{rank}}', 'w').close()
        os.write(int(os.environ['READY']), b'r')
        while True:  # not pause(), which misses a signal that comes right before it
            select.select([], [], [], 0.1)
    """)
    ready, told = os.pipe()
    os.set_inheritable(told, True)
    caller = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom largeformer.launching import local\n"
    caller += "import subprocess\nPopen = subprocess.Popen\n"
    caller += "local.subprocess.Popen = lambda *a, **k: Popen(*a, close_fds=False, **k)\n"
    caller += "sys.exit(local.spawn(2, [sys.argv[1]]))"
    # The stand-in must not shadow the real package in the caller, which therefore starts elsewhere and moves here.
    caller = f"import os; os.chdir({str(stand_in)!r})\n" + caller
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", caller, rank_script], env=os.environ | {"READY": str(told)}, pass_fds=[told], start_new_session=True
    )
    try:
        for _ in range(2):
            assert os.read(ready, 1) == b"r"
        os.killpg(process.pid, number)  # as a terminal does: to the whole foreground group
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
        os.close(ready)
        os.close(told)
    assert [(stand_in / f"stopped{rank}").read_text() for rank in range(2)] == ["1", "1"]


def test_spawn_outside_the_main_thread(stand_in: Path) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(spawn(1, ["sys.exit(5)"])))
    thread.start()
    thread.join(timeout=60)
    assert codes == [5]


def test_no_process_is_refused() -> None:
    with pytest.raises(BadInputError, match="--nproc 0"):
        spawn(0, [])


def test_ranks_meet_at_a_port_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 40, "several test runs at once rarely share one"
    assert given < 32_768 or max(ports) < given
    with socket.socket() as listener:
        listener.bind(("", 0))
        taken = listener.getsockname()[1]
        monkeypatch.setattr(local, "_PORTS", [taken] * 100)
        assert free_port() != taken, "where all are taken, one that the system gives"
