"""What compiles DeepSpeed's kernels, which happens on their first use: tools, headers, and what a killed build leaves behind.

A tool is asked by trying it, since a package that is installed may still not be found.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from largeformer.planning.findings import Finding, Level, Needs

_LIBAIO_PROGRAM = "#include <libaio.h>\nint main() { io_context_t context = nullptr; return io_setup(1, &context); }\n"


def build_tools(needs: Needs | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What compiles DeepSpeed's kernels on first use, its own Adams and NVMe, and `torch.compile`'s: nothing else does."""
    import torch

    cuda = torch.version.cuda
    kernels = needs is not None and (needs.compiled_adam or needs.nvme)
    lacking: Level = "error" if kernels or (needs is not None and needs.compiled_layers) else "warning"
    found = compiler(environ)
    if found is None:
        yield Finding("compiler", lacking, "no C++ compiler (c++, g++, clang++, CXX)", "install g++ (Debian) or gcc-c++ (Fedora)")
    else:
        yield Finding("compiler", "ok", found)
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        yield Finding(
            "compiler", lacking, "Python's headers are missing (Python.h)", "install python3-dev (Debian) or python3-devel (Fedora)"
        )
    beside_python = str(Path(sys.executable).parent)
    if shutil.which("ninja", path=os.pathsep.join([environ.get("PATH", ""), beside_python])) is None:
        yield Finding("ninja", "error" if kernels else "warning", "not found", "pip install ninja")
    if cuda and torch.cuda.is_available():
        release = cuda_release(environ)
        if release is None:
            yield Finding("nvcc", lacking, "not found", f"install the CUDA toolkit {cuda} and set CUDA_HOME")
        elif release.split(".")[0] != cuda.split(".")[0]:
            yield Finding("nvcc", lacking, f"CUDA {release}, but PyTorch is built for {cuda}", f"set CUDA_HOME to a toolkit {cuda}")
        else:
            yield Finding("nvcc", "ok", f"CUDA {release}")


def libaio(needs: Needs | None, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Offload to NVMe reads and writes by libaio: a program that uses it must compile and link."""
    if needs is not None and not needs.nvme:
        return
    if libaio_links(environ):
        yield Finding("libaio", "ok", "found")
    else:
        remedy = "install libaio-dev (Debian) or libaio-devel (Fedora), or point CFLAGS and LDFLAGS to it"
        yield Finding("libaio", "error" if needs else "warning", "not found: no offload to NVMe", remedy)


def extension_folder(environ: Mapping[str, str]) -> Path:
    """Where PyTorch keeps the kernels that it has compiled."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def locks(folder: Path) -> Iterator[Finding]:
    """Lock files of builds. One that no process holds open was left by a killed build, and every later run waits for it for ever."""
    files = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    held = open_paths() if files else set()
    for file in files:
        if str(file.resolve()) in held:
            yield Finding("kernel locks", "ok", f"{file.parent.name} is being compiled at this moment")
        else:
            remedy = f"rm '{file}' (first see that no other machine is building in this folder)"
            yield Finding("kernel locks", "error", f"a killed build left {file}: runs that need {file.parent.name} would hang", remedy)


def open_paths() -> set[str]:
    """The files that processes of this machine hold open, as far as this user may see."""
    paths = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            paths.add(str(entry.readlink()))
        except OSError:
            continue  # ended meanwhile, or another user's
    return paths


def compiler(environ: Mapping[str, str]) -> str | None:
    """The C++ compiler that PyTorch would use: CXX, else the first of the usual names on PATH."""
    names = [environ["CXX"]] if environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name, path=environ.get("PATH")))), None)


def libaio_links(environ: Mapping[str, str]) -> bool:
    """Whether a program against libaio compiles and links, with the flags of CFLAGS and LDFLAGS as DeepSpeed takes them."""
    cxx = compiler(environ)
    if cxx is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(_LIBAIO_PROGRAM)
        flags = shlex.split(environ.get("CFLAGS", "")), shlex.split(environ.get("LDFLAGS", ""))
        command = [cxx, *flags[0], str(source), "-o", str(source.with_suffix("")), *flags[1], "-laio"]
        return subprocess.run(command, env=dict(environ), capture_output=True).returncode == 0


def cuda_release(environ: Mapping[str, str]) -> str | None:
    """The release of the CUDA toolkit, as `12.8`: of CUDA_HOME, else of the nvcc on PATH. None where there is none."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin") if home else environ.get("PATH"))
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], env=dict(environ), capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release.group(1) if release else None
