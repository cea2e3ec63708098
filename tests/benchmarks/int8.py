"""onnxruntime INT8 beside onnxruntime fp32 and PyTorch: `python tests/benchmarks/int8.py [--rounds N] [--threads N] [--hidden N]`.

A Llama shape of 169M parameters with random weights, since only its speed counts (`--hidden 512`: 47M). The contestants take turns and the
minimum of each is kept; a prompt of 128 tokens, and one token after 128 in the cache. Some minutes, most of them the export. Exit code 1
where a CPU with VNNI computes integers less than 2.5 times as fast as onnxruntime's floats in one row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from largeformer.config.schema import ModelConfig
from largeformer.export import onnx
from largeformer.export.clients import OnnxClient
from largeformer.export.twin import CachedGPT
from largeformer.models.plain import PlainGPT

VOCABULARY = 8192
SHAPES = {"1x1 after 128": (1, 1, 128), "1x128": (1, 128, 0), "4x128": (4, 128, 0)}


def onnx_step(file: Path, threads: int, rows: int, length: int, past: int) -> Callable[[], object]:
    client = OnnxClient(file, threads)
    _, cache = client.advance(np.ones((rows, max(past, 1)), dtype=np.int64))
    tokens = np.ones((rows, length), dtype=np.int64)
    return lambda: client.advance(tokens, cache if past else None)


def torch_step(plain: PlainGPT, model: ModelConfig, dtype: torch.dtype, rows: int, length: int, past: int) -> Callable[[], object]:
    twin = CachedGPT(plain, model).eval()
    cache = [(torch.zeros(rows, model.query_groups, past, model.head_dim, dtype=dtype),) * 2 for _ in range(model.num_layers)]
    tokens, mask = torch.ones(rows, length, dtype=torch.int64), torch.ones(rows, past + length, dtype=torch.int64)
    positions = torch.arange(past, past + length).expand(rows, -1)

    def step() -> object:
        with torch.inference_mode():
            # Without a cache the plain model has PyTorch's fused attention, which is what people would run.
            return twin(tokens, mask, positions, cache) if past else plain(tokens)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 15), ("threads", 1), ("layers", 12), ("hidden", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = {"num_layers": given.layers, "hidden_size": given.hidden, "num_attention_heads": given.hidden // 64, "seq_length": 512}
    model = ModelConfig.model_validate(shape)
    plain = PlainGPT(model, VOCABULARY).eval()
    half = PlainGPT(model, VOCABULARY).eval().to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        file = onnx.write_float(plain, model, Path(folder))
        integers = onnx.write_int8(file, (), reduce_range=not onnx.has_vnni())
        print(f"{sum(parameter.numel() for parameter in plain.parameters()) / 1e6:.0f}M parameters")
        print(f"VNNI {onnx.has_vnni()}  threads {given.threads}  products {onnx.count_products(integers)}")
        print(f"file {integers.stat().st_size / 1e6:.1f} MB, {integers.stat().st_size / file.stat().st_size:.3f} x fp32")
        slow = []
        print(f"{'':16}{'torch fp32':>12}{'torch bf16':>12}{'onnx fp32':>12}{'onnx int8':>12}   int8 against onnx fp32")
        for name, (rows, length, past) in SHAPES.items():
            steps = [
                torch_step(plain, model, torch.float32, rows, length, past),
                torch_step(half, model, torch.bfloat16, rows, length, past),
                onnx_step(file, given.threads, rows, length, past),
                onnx_step(integers, given.threads, rows, length, past),
            ]
            best = [float("inf")] * len(steps)
            for _ in range(given.rounds):
                for index, step in enumerate(steps):
                    start = time.perf_counter()
                    step()
                    best[index] = min(best[index], time.perf_counter() - start)
            print(f"{name:16}" + "".join(f"{1000 * seconds:>10.2f}ms" for seconds in best) + f"   {best[2] / best[3]:.2f} x")
            slow += [name] if rows == 1 and best[2] / best[3] < 2.5 else []
    return 1 if slow and onnx.has_vnni() else 0


if __name__ == "__main__":
    sys.exit(main())
