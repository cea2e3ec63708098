"""What a plan knows of a machine: accelerators by name, and the cluster that they stand in.

Figures are the vendors' data sheets' for dense arithmetic; links count one direction.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any

from largeformer.config.plan import PlanConfig
from largeformer.errors import BadInputError
from largeformer.models.flops import known_peak_flops

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One accelerator. memory_gib: what a program can have of it. peak_tflops: dense, bf16 and fp16. hbm_gb_s: memory bandwidth.
    link_gb_s: to its neighbours in the node. network_gbit_s: to other nodes, its share. watts: board power. family: whose shares of
    these peaks are reached, see `planning/efficiency.py`. source: where the figures stand."""

    name: str
    memory_gib: float
    peak_tflops: float
    fp32_tflops: float
    hbm_gb_s: float
    link_gb_s: float
    network_gbit_s: float
    watts: float
    family: str
    source: str


def _of_table(name: str, memory: float, hbm: float, link: float, network: float, watts: float, family: str, source: str) -> Gpu:
    """With the peaks that MFU is measured against."""
    half, full = (known_peak_flops(name, precision) for precision in ("bf16", "fp32"))
    assert half and full, "the table of peaks has every preset"
    return Gpu(name, memory, half / 1e12, full / 1e12, hbm, link, network, watts, family, source)


PRESETS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _of_table("a100", 79.1, 2039.0, 300.0, 200.0, 400.0, "ampere", "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 x HDR"),
        _of_table("h100", 79.1, 3350.0, 450.0, 400.0, 700.0, "hopper", "NVIDIA H100 SXM data sheet; DGX H100: 8 x NDR"),
        _of_table("h200", 139.8, 4800.0, 450.0, 400.0, 700.0, "hopper", "NVIDIA H200 SXM data sheet; DGX H200: 8 x NDR"),
        _of_table("b200", 178.0, 7700.0, 900.0, 400.0, 1000.0, "blackwell", "NVIDIA HGX B200 data sheet; DGX B200: 8 x NDR"),
        _of_table("l40s", 44.5, 864.0, 32.0, 100.0, 350.0, "ada", "NVIDIA L40S data sheet; PCIe 4.0 x16, no NVLink"),
        Gpu("cpu", 16.0, 0.46, 0.10, 20.0, 2.0, 10.0, 60.0, "cpu", "one core of a server CPU with bf16 dot products, gloo on one machine"),
    )
}
_OTHER_NAMES = {"a100-80gb": "a100", "h100-sxm": "h100", "h100-80gb": "h100", "a800": "a100", "h800": "h100"}


@dataclass(frozen=True)
class Cluster:
    """Nodes of one kind of accelerator."""

    gpu: Gpu
    gpus_per_node: int
    host_gib_per_gpu: float
    pcie_gb_s: float
    nvme_gb_s: float

    def group_gb_s(self, ranks: int, stride: int = 1) -> float:
        """Bandwidth of a collective, one direction, over `ranks` that are `stride` apart. Across nodes it runs on as many rings as the
        group has ranks in a node, each over its own share of the network."""
        if (ranks - 1) * stride < self.gpus_per_node:
            return self.gpu.link_gb_s
        return min(self._network_gb_s * max(1, self.gpus_per_node // stride), self.gpu.link_gb_s)

    def pair_gb_s(self, stride: int) -> float:
        """Bandwidth from a rank to one that is `stride` away."""
        return self.gpu.link_gb_s if stride < self.gpus_per_node else min(self._network_gb_s, self.gpu.link_gb_s)

    @property
    def _network_gb_s(self) -> float:
        return self.gpu.network_gbit_s / 8

    @property
    def fuses(self) -> bool:
        """Whether PyTorch has RMSNorm, dropout and attention with dropout as kernels there; see `planning/activations.py`."""
        return self.gpu.family != "cpu"

    def peak_flops(self, precision: str) -> float:
        return (self.gpu.fp32_tflops if precision == "fp32" else self.gpu.peak_tflops) * 1e12


def find_gpu(name: str) -> Gpu:
    """The preset of that name, upper or lower case. Raises BadInputError, with the nearest name, where there is none."""
    key = name.lower().removeprefix("nvidia").strip(" -_")
    key = _OTHER_NAMES.get(key, key)
    if key in PRESETS:
        return PRESETS[key]
    nearest = difflib.get_close_matches(key, PRESETS, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise BadInputError(f"plan.gpu (--gpu) {name} is not known; {hint}there are {', '.join(PRESETS)}")


def cluster_of(plan: PlanConfig) -> Cluster:
    """The preset, with what the recipe's `plan` section says otherwise."""
    gpu = find_gpu(plan.gpu)
    given: dict[str, float | None] = {
        "memory_gib": plan.memory_gib,
        "peak_tflops": plan.peak_tflops,
        "link_gb_s": plan.link_gb_per_s,
        "network_gbit_s": plan.network_gbit_per_s,
        "watts": plan.watts,
    }
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    gpu = replace(gpu, **changed)
    return Cluster(gpu, plan.gpus_per_node, plan.host_gib_per_gpu, plan.pcie_gb_per_s, plan.nvme_gb_per_s)
