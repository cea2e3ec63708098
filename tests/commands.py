"""The command line in processes of its own, forked from one that has imported everything: what users type, without the seconds of imports.

Real launchers, signals during imports, and what W&B does as a program ends need real programs: they are started as such.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from largeformer.launching.local import free_port, rank_environ
from tests.distributed import forking

ROOT = Path(__file__).parents[1]


def run_command(
    *arguments: str, ranks: int = 1, module: str = "largeformer", environ: Mapping[str, str] | None = None, timeout: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """`python -m module *arguments` on each of `ranks` ranks, with nobody above them; one is no rank at all. Raises TimeoutError."""
    port, base = free_port(), {**os.environ, "DS_ACCELERATOR": "cpu", **(environ or {})}
    environs = [rank_environ(base, rank, ranks, port) if ranks > 1 else base for rank in range(ranks)]
    with tempfile.TemporaryDirectory(prefix="largeformer-command-") as folder:
        files = [(Path(folder) / f"out{rank}", Path(folder) / f"err{rank}") for rank in range(ranks)]
        started = [
            forking().Process(target=_command, args=(module, arguments, environ, *map(str, pair)))
            for environ, pair in zip(environs, files, strict=True)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(timeout)
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
            process.join()
        said = [[path.read_text() if path.exists() else "" for path in pair] for pair in files]
    if None in codes:
        raise TimeoutError(f"{module} {' '.join(arguments)} ran longer than {timeout:g} s: {codes}, {said}")
    return [subprocess.CompletedProcess(arguments, code or 0, *texts) for code, texts in zip(codes, said, strict=True)]


def _command(module: str, arguments: tuple[str, ...], environ: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()  # the process that it was forked from has that of the session's first pool
    os.environ.update(environ)
    os.chdir(ROOT)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    import torch

    if "OMP_NUM_THREADS" in environ:
        torch.set_num_threads(int(environ["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
