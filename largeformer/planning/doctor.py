"""What this machine has, what would fail on it, and what to do about that. Each check gives values; printing is the stage's.

Without a recipe everything is looked at and only what no recipe can do without is an error. With one, what it needs is an
error where it is missing, and what it does not need is left out.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from largeformer.errors import BadInputError
from largeformer.parallel.environment import discover
from largeformer.planning.findings import Finding, Needs
from largeformer.planning.kernels import build_tools, extension_folder, libaio, locks

GIB = 2**30
PACKAGES = {
    "torch": "2.6",
    "deepspeed": "0.19.8",
    "megatron-core": "0.16.1",
    "wandb": "0.17",
    "sentencepiece": "0.2",
    "pydantic": "2.6",
    "safetensors": "0.4",
    "tensorboard": "2.10",
}
LITTLE_SHARED_MEMORY = 1 * GIB  # containers start with 64 MiB; NCCL and data loader workers take hundreds
LITTLE_DISK = 5 * GIB
FEW_FILES = 1024  # a rank opens a socket for each peer, and a file for each data source


def diagnose(needs: Needs | None, environ: Mapping[str, str]) -> list[Finding]:
    """All checks, in the order in which a run would meet what they look at."""
    found = [Finding("python", "ok", platform.python_version()), *packages(), *conflicts()]
    if any(finding.check == "torch" and finding.level == "error" for finding in found):
        return found  # what follows asks PyTorch
    extensions = extension_folder(environ)
    checks: list[Callable[[], Iterator[Finding]]] = [
        lambda: accelerator(needs),
        lambda: precision(needs),
        lambda: build_tools(needs, environ),
        lambda: libaio(needs, environ),
        lambda: locks(extensions),
        backends,
        lambda: shared_memory(Path("/dev/shm")),
        lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        lambda: disk(needs.output_dir if needs else Path(), needs.disk_bytes if needs else 0),
        lambda: wandb_login(needs, environ),
        lambda: launcher(environ),
    ]
    return found + [finding for check in checks for finding in check()]


def packages(minimums: Mapping[str, str] = PACKAGES) -> Iterator[Finding]:
    """The libraries that every run imports, against the oldest version that serves."""
    from packaging.version import Version

    for name, minimum in minimums.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "error", "not installed", f"pip install '{name}>={minimum}'")
            continue
        old = Version(version) < Version(minimum)
        yield Finding(name, "error" if old else "ok", version, f"pip install '{name}>={minimum}'" if old else "")


def conflicts(names: tuple[str, ...] = ("deepspeed", "megatron-core", "wandb", "tensorboard")) -> Iterator[Finding]:
    """Requirements of the installed libraries that the other installed ones do not meet."""
    from packaging.requirements import Requirement

    for name in names:
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # told by `packages`
        for requirement in map(Requirement, requirements):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                version = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                have = "is not installed" if version is None else f"is {version}"
                remedy = f"pip install '{requirement.name}{requirement.specifier}'"
                yield Finding(name, "error", f"needs {requirement.name}{requirement.specifier}, which {have}", remedy)


def accelerator(needs: Needs | None) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield Finding("gpu", "ok", f"{index}: {gpu.name}, {gpu.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}")
    elif torch.version.cuda:
        remedy = "check nvidia-smi, the driver's version and CUDA_VISIBLE_DEVICES; on a machine without GPU nothing is to be done"
        yield Finding("gpu", "warning", f"PyTorch is built for CUDA {torch.version.cuda} but sees no GPU: runs use the CPU", remedy)
    elif shutil.which("nvidia-smi"):
        yield Finding("gpu", "warning", "a GPU driver is here, but this PyTorch is built for CPUs", "install a CUDA build of PyTorch")
    else:
        yield Finding("gpu", "ok", f"none: runs use the CPU ({len(os.sched_getaffinity(0))} cores)")


def precision(needs: Needs | None) -> Iterator[Finding]:
    """Whether the hardware computes in 16 bits. What it cannot do at all is an error where the recipe asks for it."""
    import torch

    from largeformer.parallel.device import machine_problems

    for name in [needs.precision] if needs else ["bf16", "fp16"]:
        if problems := machine_problems(name, 0):
            message = f"{name} is not supported by this machine"
            yield Finding("precision", "error" if needs else "warning", message, "; ".join(problems))
        elif name == "bf16" and not torch.cuda.is_available() and not cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
            remedy = "fp32 may be faster here; GPUs and newer CPUs have bf16"
            yield Finding("precision", "warning", "bf16 is computed by conversion: this CPU has no instructions for it", remedy)
        else:
            yield Finding("precision", "ok", f"{name} is supported")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the first CPU says that it can do (`flags` on x86, `Features` on Arm); empty where the system does not tell."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))), set())


def backends() -> Iterator[Finding]:
    """The libraries that carry collectives between ranks."""
    import torch
    import torch.distributed as dist

    names = ["gloo", *(["nccl"] if torch.cuda.is_available() else [])]
    available = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()} if dist.is_available() else {}
    for name in names:
        if available.get(name):
            yield Finding("backend", "ok", name)
        else:
            yield Finding("backend", "error", f"this PyTorch has no {name}", "install an official build of PyTorch for Linux")


def shared_memory(folder: Path) -> Iterator[Finding]:
    size = shutil.disk_usage(folder).total if folder.exists() else 0
    if size < LITTLE_SHARED_MEMORY:
        remedy = "start the container with --shm-size=8g or --ipc=host, or remount /dev/shm larger"
        yield Finding("shared memory", "warning", f"{folder} has {size / 2**20:.0f} MiB: ranks on one machine may run out of it", remedy)
    else:
        yield Finding("shared memory", "ok", f"{size / GIB:.0f} GiB")


def open_files(limit: int) -> Iterator[Finding]:
    if limit != resource.RLIM_INFINITY and limit < FEW_FILES:
        yield Finding("open files", "warning", f"at most {limit} for a process", f"ulimit -n {16 * FEW_FILES}")
    else:
        yield Finding("open files", "ok", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit} for a process")


def disk(folder: Path, needed: int) -> Iterator[Finding]:
    """Room and permission where checkpoints will go: in `folder`, or where it will be made. `needed` in bytes, 0 if unknown."""
    folder = folder.absolute()
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        yield Finding("disk", "error", f"{there} is not a folder that may be written to", "set run.output_dir to another folder")
        return
    free = shutil.disk_usage(there).free
    told = f"{free / GIB:.1f} GiB free in {there}"
    if free < needed:
        remedy = "free some, set run.output_dir elsewhere, or keep fewer (checkpoint.keep_last, keep_best, keep_every)"
        yield Finding("disk", "error", f"{told}; the checkpoints take up to {needed / GIB:.1f} GiB", remedy)
    elif free < LITTLE_DISK:
        yield Finding("disk", "warning", told, "free some, or set run.output_dir elsewhere")
    else:
        yield Finding("disk", "ok", told + (f"; the checkpoints take up to {needed / GIB:.2f} GiB" if needed else ""))


def wandb_login(needs: Needs | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    from urllib.parse import urlsplit

    from largeformer.tracking.wandb_login import has_key

    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    if has_key(host):
        yield Finding("wandb login", "ok", f"a key for {host} is here")
    elif needs is not None and needs.wandb_online:
        remedy = "wandb login, set WANDB_API_KEY, or set tracking.wandb.mode to offline"
        yield Finding("wandb login", "error", f"no key for {host}: the run would not start", remedy)
    else:
        yield Finding("wandb login", "ok", "no key: runs are recorded offline")


def launcher(environ: Mapping[str, str]) -> Iterator[Finding]:
    """What the launcher's variables say, and whether SLURM is at hand."""
    try:
        info = discover(environ)
    except BadInputError as error:
        yield Finding("launcher", "error", str(error), "start the ranks with deepspeed, torchrun or srun")
    else:
        told = (
            "no launcher's variables: one process"
            if info.launcher == "none"
            else f"rank {info.rank} of {info.world_size}, by {info.launcher}"
        )
        yield Finding("launcher", "ok", told)
    slurm = shutil.which("sbatch", path=environ.get("PATH"))
    yield Finding("slurm", "ok", f"found ({slurm})" if slurm else "not found: jobs cannot be submitted from here")
