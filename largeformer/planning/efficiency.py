"""What share of an accelerator's peak an operation reaches, predicted from its size: a roofline with few constants.

The constants are fitted to half of a table of published runs and checked against the other half; `docs/planning.md` has both,
with sources and errors. They stand here for a family of chips, never for a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from largeformer.planning.hardware import Cluster


@dataclass(frozen=True)
class Efficiency:
    """matmul: share of the peak that large matrix products reach. attention: the same for fused causal attention, forward and
    backward together (not fitted: Dao 2023, arXiv:2307.08691, section 4). memory: share of the memory bandwidth that elementwise
    work reaches. link: share of a link's bandwidth that a collective reaches. launch_s: the least time of a layer's forward, which
    its kernels take to start. latency_s: of a message."""

    matmul: float
    attention: float
    memory: float
    link: float
    launch_s: float
    latency_s: float


FAMILIES: dict[str, Efficiency] = {
    "ampere": Efficiency(matmul=0.74, attention=0.55, memory=0.9, link=0.9, launch_s=150e-6, latency_s=12e-6),
    "hopper": Efficiency(matmul=0.58, attention=0.42, memory=0.5, link=0.7, launch_s=150e-6, latency_s=12e-6),
    # No runs of these are in the table: Hopper's shares.
    "blackwell": Efficiency(matmul=0.58, attention=0.42, memory=0.5, link=0.7, launch_s=150e-6, latency_s=12e-6),
    "ada": Efficiency(matmul=0.58, attention=0.42, memory=0.5, link=0.7, launch_s=150e-6, latency_s=12e-6),
    "cpu": Efficiency(matmul=0.80, attention=0.25, memory=0.5, link=0.5, launch_s=0.0, latency_s=300e-6),
}
_HALF = 64.0
"""A dimension of that size reaches half of the share, another three quarters at thrice the size."""
_HALF_ON_CPU = 4.0


@dataclass(frozen=True)
class Speed:
    """Times of single operations on one rank, in seconds, at a precision's peak."""

    cluster: Cluster
    precision: str

    @property
    def efficiency(self) -> Efficiency:
        return FAMILIES[self.cluster.gpu.family]

    def matmul(self, m: float, n: float, k: float) -> float:
        """A product [m, k] x [k, n]. Small dimensions fill the chip's tiles badly."""
        half = _HALF_ON_CPU if self.cluster.gpu.family == "cpu" else _HALF
        share = self.efficiency.matmul
        for size in (m, n, k):
            share *= size / (size + half)
        width = 4 if self.precision == "fp32" else 2
        moved = width * (m * k + k * n + m * n)
        return max(2 * m * n * k / (self._peak * share), self.memory(moved))

    def attention(self, flops: float) -> float:
        return flops / (self._peak * self.efficiency.attention)

    def memory(self, moved: float) -> float:
        """Bytes read and written on the device."""
        return moved / (self.cluster.gpu.hbm_gb_s * 1e9 * self.efficiency.memory)

    def all_gather(self, total: float, ranks: int, stride: int = 1) -> float:
        """Also a reduce-scatter: each rank sends and receives all but its own part of `total` bytes, on a ring."""
        if ranks == 1:
            return 0.0
        bandwidth = self.cluster.group_gb_s(ranks, stride) * 1e9 * self.efficiency.link
        return (ranks - 1) / ranks * total / bandwidth + self.efficiency.latency_s * (1 + ranks / 64)

    def all_reduce(self, total: float, ranks: int, stride: int = 1) -> float:
        return 2 * self.all_gather(total, ranks, stride)

    def send(self, sent: float, stride: int) -> float:
        """From one pipeline stage to the next, `stride` ranks away."""
        bandwidth = self.cluster.pair_gb_s(stride) * 1e9 * self.efficiency.link
        return sent / bandwidth + self.efficiency.latency_s

    @property
    def _peak(self) -> float:
        return self.cluster.peak_flops(self.precision)
