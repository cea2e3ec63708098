"""Optimizer state inside DeepSpeed's optimizers, one parameter at a time, and of it the part that this rank holds. And one mistake of
its partitioning, corrected.

Each stage keeps float32 masters in flat partitions and moments under those in the base optimizer, which holds none before its
first step. The library can set them only where they exist, and under ZeRO 3 only where the parameter divides evenly.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F


@contextlib.contextmanager
def partitioned_as_they_are() -> Iterator[None]:
    """Within, ZeRO 3 takes parameters for the dtype that they have. DeepSpeed takes them for bfloat16 wherever fp16 is not supported
    (0.19.8, `partition_parameters.py`, `_set_dtype`: `or` binds tighter than `if`): on a CPU it would swap float32 ones to NVMe as
    bfloat16, and round them."""
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Partitioning

    original = Partitioning._set_dtype

    def set_dtype(self: Any, ds_config: Any, dtype: torch.dtype | None) -> None:
        original(self, ds_config, dtype)
        self.dtype = dtype or self.dtype

    Partitioning._set_dtype = set_dtype
    try:
        yield
    finally:
        Partitioning._set_dtype = original


def forget_models() -> None:
    """ZeRO 3 notes every model that it wraps for good (0.19.8), and with it engine and process groups: in a list of the modules that
    are in their forward, in the cache of a method, and by its hooks on rotary embeddings, which Megatron-core keeps in a cache."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    parameter_offload.FWD_MODULE_STACK.clear()
    instrumented = vars(PartitionedParameterCoordinator).get("_PartitionedParameterCoordinator__params_to_release")
    cells = getattr(instrumented, "__closure__", None) or ()
    for cached in (*(cell.cell_contents for cell in cells), *vars(RotaryEmbedding).values()):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def local_range(wrapped: Any, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """First element, and number, of those of the flat parameter whose float32 state this data-parallel rank holds; without ZeRO all."""
    if wrapped.zero_optimization_stage() == 0:
        return 0, parameter.numel()
    if hasattr(parameter, "ds_tensor"):
        size, whole = parameter.ds_tensor.ds_numel, parameter.ds_numel  # type: ignore[attr-defined]
        start = min(size * dist.get_rank(parameter.ds_process_group), whole)  # type: ignore[attr-defined]
        return start, min(size, whole - start)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def local_part(wrapped: Any, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    """That part of the "master" or of a moment: float32, flat. Where the optimizer keeps it in memory, it is that memory."""
    if wrapped.zero_optimization_stage() == 0:
        return (parameter.detach() if kind == "master" else wrapped.optimizer.state[parameter][kind]).flatten()
    if hasattr(parameter, "ds_tensor"):
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        part = safe_get_local_fp32_param(parameter) if kind == "master" else safe_get_local_optimizer_state(parameter, kind)
        return part.flatten()[: local_range(wrapped, parameter)[1]]  # type: ignore[no-any-return]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return torch.empty(0)
    return mapping.get_hp_fragment(None if kind == "master" else kind).detach().flatten()  # type: ignore[no-any-return]


def set_local_state(
    wrapped: Any, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor, moments: Sequence[str], steps: int
) -> None:
    """`value`: this rank's part of the float32 "master" or moment, flat. `moments`: all that there are to be; `steps`: that the optimizer
    took."""
    if wrapped.zero_optimization_stage() == 0:
        _set_plain(wrapped.optimizer, parameter, kind, value.view(parameter.shape), steps)
        return
    _make_moments(wrapped.optimizer, moments, steps)
    if hasattr(parameter, "ds_tensor"):
        _set_partition(parameter, value, None if kind == "master" else kind)
    elif value.numel():
        local_part(wrapped, parameter, kind).copy_(value)


def _set_plain(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor, steps: int) -> None:
    if kind == "master":
        parameter.data.copy_(value)
        return
    state = optimizer.state[parameter]
    state[kind] = value.to(parameter.device)
    if kind == "exp_avg":
        state["step"] = _step_count(optimizer, steps, parameter)


def _make_moments(optimizer: Any, moments: Sequence[str], steps: int) -> None:
    """Give each master the state that a first step would have made. Does nothing the second time."""
    base = optimizer.optimizer
    made = False
    for group, master in enumerate(_masters(optimizer)):
        state = base.state[master]
        if missing := [kind for kind in moments if kind not in state]:
            with _group_in_memory(optimizer, group):
                state.update({kind: torch.zeros_like(master) for kind in missing})
            made = True
        if "exp_avg" in moments and int(state.get("step", -1)) != steps:
            state["step"] = _step_count(base, steps, master)
            made = True
    if made:
        link_moments(optimizer)


def _step_count(optimizer: torch.optim.Optimizer, steps: int, stepped: torch.Tensor) -> torch.Tensor | int:
    """As `optimizer` keeps it: DeepSpeed's in a number, PyTorch's in a tensor, whose fused kernels want it on their device."""
    if not type(optimizer).__module__.startswith("torch."):
        return steps
    return torch.tensor(float(steps), device=stepped.device if optimizer.defaults.get("fused") else "cpu")


@contextlib.contextmanager
def _group_in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """The masters and moments of ZeRO 3's group; where they stand on NVMe they are read, and written back at the end."""
    swapped = hasattr(optimizer, "_swappable_optimizer_subgroup") and optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def link_moments(optimizer: Any) -> None:
    """ZeRO 1 and 2: show each parameter its part of the moments. DeepSpeed does so in its first step, but there it sees the
    first parameter group only and takes the rest for done (0.19.8, `stage_1_and_2.py`, `_optimizer_step`)."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _masters(optimizer: Any) -> list[torch.Tensor]:
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise TypeError(f"{type(optimizer).__name__} keeps its masters where this version of the package does not look")


def _set_partition(parameter: torch.nn.Parameter, value: torch.Tensor, kind: str | None) -> None:
    """ZeRO 3: `value` and zeros up to the partition's size; a master is copied into the weight as well."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    with _in_memory(parameter) as partition:
        padded = F.pad(value, (0, partition.numel() - value.numel()))
        if kind is None:
            safe_set_local_fp32_param(parameter, padded)
            partition.data.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)


@contextlib.contextmanager
def _in_memory(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """This rank's partition of a ZeRO 3 weight; where it stands on NVMe it is read, and written back at the end."""
    partition: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    swapped = partition.status.name == "NOT_AVAILABLE"  # type: ignore[attr-defined]
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)  # type: ignore[attr-defined]
    yield partition
    if swapped:
        parameter.nvme_swapper.swap_out_and_release([parameter])  # type: ignore[attr-defined]
