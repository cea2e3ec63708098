"""The device of this process, and the only place that teaches Megatron-core to run without CUDA.

Megatron-core 0.16 asks for CUDA by name in six spots: the current device, `Tensor.cuda()`, `torch.cuda.synchronize`, a
`torch.zeros(..., device="cuda")` in each schedule, a `torch.ones` for the causal mask of its own attention, and the random-state
tracker. On a machine without a GPU these are answered by their CPU counterparts; nothing else of the library changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch

_TRACKED = "model-parallel-rng"


def prepare_device(local_rank: int, local_world_size: int = 1) -> torch.device:
    """Select this process's device: GPU number `local_rank` where CUDA is there, else its share of the CPU, adapted."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    _adapt_megatron_to_cpu()
    return torch.device("cpu")


def machine_problems(precision: str, local_rank: int) -> list[str]:
    """What this machine lacks for `precision`; empty where nothing is."""
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            return [f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start as many ranks as GPUs"]
        if precision == "bf16" and not torch.cuda.is_bf16_supported():
            return [f"train.precision bf16 is not supported by {torch.cuda.get_device_name(local_rank)}: use fp16 or fp32"]
        return []
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return ["train.precision fp16 needs a GPU, or a CPU with fp16 arithmetic, which this one lacks: use bf16 or fp32"]
    return []


def seed_ranks(seed: int, tensor: int, data: int, pipeline: int) -> None:
    """Seed dropout, and Python's and NumPy's generators with it: alike over tensor-parallel ranks outside their regions, different
    inside, and over data and pipeline.

    Arguments are the recipe's seed and the rank's coordinates. (Megatron's scheme: one tracked state beside the default.)
    """
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    shared = seed + 100_003 * pipeline + 1_009 * data
    torch.manual_seed(shared)
    random.seed(shared)
    np.random.seed(shared % 2**32)
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(_TRACKED, shared + 2718 + tensor)


def rng_states() -> dict[str, torch.Tensor]:
    """Every random state that training, its data and its libraries draw from, as uint8 tensors; Python's and NumPy's as JSON in them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    kind, keys, *place = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        **{f"tracker.{k}": v for k, v in get_cuda_rng_tracker().get_states().items()},
        "python": _as_tensor(random.getstate()),
        "numpy": _as_tensor([kind, np.asarray(keys).tolist(), *place]),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def fits_device(states: dict[str, torch.Tensor]) -> bool:
    """Whether `states` were saved on the kind of device that is here: generators of GPUs and CPUs do not read each other's."""
    return ("cuda" in states) == torch.cuda.is_available()


def restore_rng_states(states: dict[str, torch.Tensor]) -> None:
    """The inverse of `rng_states`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states({k.removeprefix("tracker."): v for k, v in states.items() if k.startswith("tracker.")})
    version, keys, gauss = _from_tensor(states["python"])
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(_from_tensor(states["numpy"])))
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _as_tensor(state: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _from_tensor(state: torch.Tensor) -> Any:
    return json.loads(bytes(state.tolist()))


def _adapt_megatron_to_cpu() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer import utils as megatron_utils

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    schedules.torch = megatron_utils.torch = _TorchOnCpu("torch")
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not isinstance(megatron_random._CUDA_RNG_STATE_TRACKER, _cpu_tracker_class()):
        megatron_random._CUDA_RNG_STATE_TRACKER = _cpu_tracker_class()()
        megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


class _TorchOnCpu(ModuleType):
    """The `torch` that these modules see: a tensor asked for on CUDA is made on the CPU, all else is torch itself."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **kwargs)

    @staticmethod
    def ones(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.ones(*size, device="cpu" if device == "cuda" else device, **kwargs)


def _cpu_tracker_class() -> type:
    """Megatron's tracker over torch's CPU generator. A subclass, since the library tests for its type; made on demand and
    kept on the library's module, so that importing this file imports no Megatron."""
    from megatron.core.tensor_parallel import random as megatron_random

    made = getattr(megatron_random, "CpuRNGStatesTracker", None)
    if made is not None:
        return made  # type: ignore[no-any-return]

    class CpuRNGStatesTracker(megatron_random.CudaRNGStatesTracker):  # type: ignore[misc]
        _current_state_name: str

        def add(self, name: str, seed: int) -> None:
            before = torch.get_rng_state()
            torch.manual_seed(seed)
            self.set_states({**self.states_, name: torch.get_rng_state()})
            torch.set_rng_state(before)

        @contextlib.contextmanager
        def fork(self, name: str = _TRACKED) -> Iterator[None]:
            outside, outer_name = torch.get_rng_state(), self._current_state_name
            torch.set_rng_state(self.states_[name] if outer_name != name else outside)
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside if outer_name != name else self.states_[name])
                self._current_state_name = outer_name

    megatron_random.CpuRNGStatesTracker = CpuRNGStatesTracker
    return CpuRNGStatesTracker
