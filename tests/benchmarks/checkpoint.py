"""What saving costs: `python tests/benchmarks/checkpoint.py [--params 25] [--rounds 7]`.

A Llama of `--params` million parameters on one process, fp32, ZeRO 1, with its Adam moments. Taking turns, so that a disk or a core
that others use slows all alike:

- plain: the same bytes from memory to one file and fsync; and that file read back, from the disk
- synchronous: a checkpoint, hashed and committed; and read back, verified, into the engine
- asynchronous: how long training stands still for one; it is finished before the next turn

The page cache is emptied of a file before it is read. Medians are printed, and ratios of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from largeformer.checkpoint.retention import Policy
from largeformer.checkpoint.verify import find
from largeformer.config.checkpoint import CheckpointConfig
from largeformer.launching.local import free_port, rank_environ
from largeformer.tracking.tracker import FanOut
from largeformer.training.checkpointing import Progress, TrainingState, load_training_state, load_weights
from largeformer.training.saving import Checkpoints
from tests.distributed import RankContext
from tests.training.engines import Bench, bench_of, global_batch, sgd_recipe


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=int, default=25, help="millions")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    os.environ.update({**rank_environ(os.environ, 0, 1, free_port()), "DS_ACCELERATOR": "cpu"})
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        hidden = 512
        layers = max(1, round(arguments.params * 1e6 / (12 * hidden * hidden)))
        recipe = sgd_recipe(
            model={"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": 1408, "num_attention_heads": 8},
            optimizer={"type": "adamw", "lr": 1e-4},
            deepspeed="ds_configs/zero1.json",
        )
        with bench_of(RankContext(0, 1), recipe) as bench:
            bench.engine.train_step(bench.share(global_batch(recipe)), 1e-4)
            compare(bench, folder, arguments.rounds)


def compare(bench: Bench, folder: Path, rounds: int) -> None:
    synchronous, behind = (_checkpoints(bench, folder / kind, kind == "asynchronous") for kind in ("synchronous", "asynchronous"))
    content = b""
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        work()
        times.setdefault(name, []).append(time.perf_counter() - start)

    for number in range(1, rounds + 2):
        state = TrainingState(Progress(step=number))
        timed("synchronous save", lambda state=state: synchronous.save(state))
        checkpoint = find(folder / "synchronous", hashes=False).checkpoint
        content = content or b"".join(path.read_bytes() for path in sorted(checkpoint.rglob("*.safetensors")))
        timed("plain write", lambda content=content: _write(folder / "plain", content))
        timed("blocked by an asynchronous save", lambda state=state: behind.save(state))
        behind._complete()
        _forget(checkpoint)
        timed("load, verified", lambda: _load(bench, folder / "synchronous"))
        _forget(folder / "plain")
        timed("plain read", lambda: (folder / "plain").read_bytes())
        if number == 1:  # buffers are made, memory is touched for the first time
            times.clear()
    synchronous.finish()
    behind.finish()
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{len(content) / 2**20:.0f} MiB, medians of {rounds}, {torch.get_num_threads()} threads")
    for name, seconds in median.items():
        print(f"  {name:<34}{seconds:8.3f} s{len(content) / 2**20 / seconds:10.0f} MiB/s   least {min(times[name]):.3f} s")
    ours, plain = median["synchronous save"] + median["load, verified"], median["plain write"] + median["plain read"]
    print(f"  save + load / plain write + read   {ours / plain:8.2f}   (aim: at most 2)")
    blocked = median["blocked by an asynchronous save"] / median["synchronous save"]
    print(f"  blocked / synchronous save         {blocked:8.2f}   (aim: at most 0.20)")


def _checkpoints(bench: Bench, folder: Path, async_save: bool) -> Checkpoints:
    return Checkpoints(folder, bench.engine, FanOut(), "", CheckpointConfig(async_save=async_save), Policy(keep_last=1))


def _load(bench: Bench, folder: Path) -> None:
    checkpoint = find(folder).checkpoint
    load_weights(checkpoint, bench.shards)
    load_training_state(checkpoint, bench.engine)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())


def _forget(path: Path) -> None:
    """Have the next read come from the disk."""
    for file in [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
