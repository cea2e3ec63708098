"""The doctor's checks: each is shown the trouble that it is there to find, made for real where that can be done."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from largeformer.config.deepspeed import load_deepspeed
from largeformer.config.load import load_recipe
from largeformer.planning import doctor, kernels
from largeformer.planning.findings import Finding, Needs
from largeformer.stages import doctor as stage

PLAIN = Needs("fp32", compiled_adam=False, compiled_layers=False, nvme=False, wandb_online=False, disk_bytes=0, output_dir=Path())
NVME = Needs("fp32", compiled_adam=False, compiled_layers=False, nvme=True, wandb_online=False, disk_bytes=0, output_dir=Path())


def needs_of(*overrides: str) -> Needs:
    recipe = load_recipe("quickstart", overrides)
    return Needs.of(recipe, load_deepspeed(recipe))


def levels(findings: Iterable[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


@pytest.mark.parametrize(
    ("overrides", "field", "expected"),
    [
        pytest.param([], "precision", "fp32", id="precision"),
        pytest.param([], "nvme", False, id="no NVMe"),
        pytest.param(["deepspeed=zero3_offload_nvme"], "nvme", True, id="NVMe"),
        pytest.param([], "compiled_adam", False, id="PyTorch's Adam"),
        pytest.param(["deepspeed=zero2_offload_cpu"], "compiled_adam", True, id="offload takes DeepSpeed's CPU Adam"),
        pytest.param(["deepspeed=zero2_offload_cpu", "optimizer.backend=torch"], "compiled_adam", False, id="offload with PyTorch's Adam"),
        pytest.param(["optimizer.backend=deepspeed_cpu", "deepspeed=zero2_offload_cpu"], "compiled_adam", True, id="asked for by name"),
        pytest.param(["deepspeed=zero2_offload_cpu", "optimizer.type=sgd"], "compiled_adam", False, id="SGD is not compiled"),
        pytest.param([], "compiled_layers", False, id="eager layers"),
        pytest.param(["train.compile=true"], "compiled_layers", True, id="compiled layers"),
        pytest.param([], "wandb_online", False, id="W&B offline"),
        pytest.param(["tracking.wandb.mode=online"], "wandb_online", True, id="W&B online"),
        pytest.param(["run.output_dir=elsewhere"], "output_dir", Path("elsewhere"), id="output folder"),
    ],
)
def test_what_a_recipe_needs(overrides: list[str], field: str, expected: object) -> None:
    assert getattr(needs_of(*overrides), field) == expected


def test_checkpoint_bytes_by_hand() -> None:
    """One layer, h 4, f 8, SwiGLU, no biases, 128 rows: 2 x 128 x 4 + (4 x 16 + 3 x 32 + 2 x 4) + 4 = 1196 parameters."""
    shape = ["num_layers=1", "hidden_size=4", "ffn_hidden_size=8", "num_attention_heads=1", "num_query_groups=1"]
    tiny = [f"model.{value}" for value in shape] + ["tokenizer.vocab_size=128", "checkpoint.keep_last=2"]
    assert needs_of(*tiny, "train.precision=bf16").disk_bytes == 1196 * (2 + 4 + 8) * 3
    assert needs_of(*tiny, "train.precision=fp32").disk_bytes == 1196 * (4 + 8) * 3
    sgd = ["train.precision=fp32", "optimizer.type=sgd"]
    assert needs_of(*tiny, *sgd, "optimizer.momentum=0.9").disk_bytes == 1196 * (4 + 4) * 3
    assert needs_of(*tiny, *sgd, "optimizer.momentum=0").disk_bytes == 1196 * 4 * 3
    kept = ["checkpoint.save_interval=10", "checkpoint.keep_best=2", "checkpoint.keep_every=25", "train.train_iters=100"]
    assert needs_of(*tiny, "train.precision=fp32", "train.eval_interval=10", *kept).disk_bytes == 1196 * (4 + 8) * (2 + 2 + 2 + 1)


def test_installed_packages_serve() -> None:
    assert set(levels(doctor.packages())) == {"ok"}


@pytest.mark.parametrize(
    ("minimums", "message"),
    [({"torch": "99.0"}, "2."), ({"no-such-package-of-largeformer": "1.0"}, "not installed")],
    ids=["too old", "absent"],
)
def test_package_that_does_not_serve(minimums: dict[str, str], message: str) -> None:
    finding = only(doctor.packages(minimums))
    assert finding.level == "error"
    assert message in finding.message
    assert f"pip install '{finding.check}>={minimums[finding.check]}'" == finding.remedy


@pytest.mark.parametrize(
    ("requirement", "conflict"),
    [
        ("numpy>=1.0", None),
        ("numpy<1.0", "needs numpy<1.0, which is "),
        ("no-such-package-of-largeformer", "needs no-such-package-of-largeformer, which is not installed"),
        ("numpy<1.0; extra == 'old'", None),
        ("numpy<1.0; python_version < '3'", None),
    ],
)
def test_conflicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, requirement: str, conflict: str | None) -> None:
    info = tmp_path / "patient-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: patient\nVersion: 1.0\nRequires-Dist: {requirement}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    told = [finding.message for finding in doctor.conflicts(("patient",))]
    assert [conflict is not None and message.startswith(conflict) for message in told] == [True] * (conflict is not None)


def test_a_killed_build_is_told_from_a_running_one(tmp_path: Path) -> None:
    """PyTorch's own lock, taken as a build takes it: here by a process that dies, then by this one."""
    from torch.utils.file_baton import FileBaton

    lock = tmp_path / "py311_cpu" / "async_io" / "lock"
    lock.parent.mkdir(parents=True)
    assert not list(kernels.locks(tmp_path))
    die = f"from torch.utils.file_baton import FileBaton; import os; FileBaton({str(lock)!r}).try_acquire(); os._exit(9)"
    subprocess.run([sys.executable, "-c", die], timeout=120)
    finding = only(kernels.locks(tmp_path))
    assert finding.level == "error"
    assert "async_io" in finding.message and f"rm '{lock}'" in finding.remedy
    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    assert levels(kernels.locks(tmp_path)) == ["ok"]
    baton.release()
    assert not list(kernels.locks(tmp_path))


@pytest.mark.parametrize("set_by_user", [False, True])
def test_extension_folder_is_pytorchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_by_user: bool) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    if set_by_user:
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "kernels"))
    build = Path(cpp_extension._get_build_directory("probe", verbose=False))
    (build / "lock").touch()
    folder = kernels.extension_folder(os.environ)
    assert folder in build.parents
    assert levels(kernels.locks(folder)) == ["error"]


def test_libaio_is_tried(tmp_path: Path) -> None:
    """A stand-in for libaio where CFLAGS and LDFLAGS point to it: header alone does not link, header and library do."""
    environ = {"PATH": os.environ["PATH"], "CFLAGS": f"-I{tmp_path}", "LDFLAGS": f"-L{tmp_path}"}
    (tmp_path / "libaio.h").write_text('typedef struct stand_in* io_context_t;\nextern "C" int io_setup(int, io_context_t*);\n')
    source = tmp_path / "aio.cpp"
    source.write_text('#include "libaio.h"\nint io_setup(int, io_context_t*) { return 0; }\n')
    installed = kernels.libaio_links({"PATH": os.environ["PATH"]})
    assert kernels.libaio_links(environ) is installed
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / "libaio.so")], check=True)
    assert kernels.libaio_links(environ)
    assert levels(kernels.libaio(NVME, environ)) == ["ok"]


def test_libaio_as_deepspeed_finds_it() -> None:
    script = "import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
    script += "from deepspeed.ops.op_builder.cpu import AsyncIOBuilder; print('found', AsyncIOBuilder().is_compatible())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert f"found {kernels.libaio_links(os.environ)}" in done.stdout, done.stderr


def test_libaio_is_an_error_only_for_who_needs_it(tmp_path: Path) -> None:
    nothing = {"PATH": str(tmp_path)}
    assert levels(kernels.libaio(NVME, nothing)) == ["error"]
    assert levels(kernels.libaio(None, nothing)) == ["warning"]
    assert levels(kernels.libaio(PLAIN, nothing)) == []


@pytest.mark.parametrize(
    ("needs", "level"),
    [
        pytest.param(None, "warning", id="no recipe"),
        pytest.param(PLAIN, "warning", id="nothing is compiled"),
        pytest.param(NVME, "error", id="NVMe"),
        pytest.param(replace(PLAIN, compiled_adam=True), "error", id="DeepSpeed's Adam"),
        pytest.param(replace(PLAIN, compiled_layers=True), "error", id="compiled layers"),
    ],
)
def test_no_compiler(tmp_path: Path, needs: Needs | None, level: str) -> None:
    assert level in [finding.level for finding in kernels.build_tools(needs, {"PATH": str(tmp_path)}) if finding.check == "compiler"]


def test_compiler(tmp_path: Path) -> None:
    assert kernels.compiler({"PATH": str(tmp_path)}) is None
    own = tmp_path / "my-c++"
    own.write_text("#!/bin/sh\n")
    own.chmod(own.stat().st_mode | stat.S_IXUSR)
    assert kernels.compiler({"PATH": str(tmp_path), "CXX": "my-c++"}) == str(own)


def test_cuda_release_is_that_of_cuda_home(tmp_path: Path) -> None:
    for folder, release in (("on_path", "11.8"), ("home/bin", "12.8")):
        nvcc = tmp_path / folder / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.89'\n")
        nvcc.chmod(0o755)
    path = f"{tmp_path / 'on_path'}:{os.environ['PATH']}"
    assert kernels.cuda_release({"PATH": path}) == "11.8"
    assert kernels.cuda_release({"PATH": path, "CUDA_HOME": str(tmp_path / "home")}) == "12.8"
    assert kernels.cuda_release({"PATH": str(tmp_path)}) is None


def test_disk(tmp_path: Path) -> None:
    assert "error" not in levels(doctor.disk(tmp_path / "not" / "yet" / "there", 0))
    full = only(doctor.disk(tmp_path, 2**60))
    assert full.level == "error" and "the checkpoints take up to" in full.message
    (tmp_path / "file").touch()
    blocked = only(doctor.disk(tmp_path / "file" / "run", 0))
    assert blocked.level == "error" and "run.output_dir" in blocked.remedy


@pytest.mark.parametrize(("limit", "level"), [(256, "warning"), (1024, "ok"), (-1, "ok")])
def test_open_files(limit: int, level: str) -> None:
    assert levels(doctor.open_files(limit)) == [level]


def test_no_shared_memory(tmp_path: Path) -> None:
    assert levels(doctor.shared_memory(tmp_path / "absent")) == ["warning"]


def test_cpu_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert doctor.cpu_flags(cpuinfo) == {"fpu", "avx512_bf16", "amx_bf16"}
    assert doctor.cpu_flags(tmp_path / "absent") == set()


def test_fp16_is_an_error_where_the_recipe_asks_for_it() -> None:
    import torch

    half = Needs("fp16", compiled_adam=False, compiled_layers=False, nvme=False, wandb_online=False, disk_bytes=0, output_dir=Path())
    supported = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert levels(doctor.precision(half)) == ["ok" if supported else "error"]
    assert levels(doctor.precision(PLAIN)) == ["ok"]
    assert "error" not in levels(doctor.precision(None))


@pytest.mark.parametrize(
    ("online", "key", "level"),
    [
        (True, None, "error"),
        (False, None, "ok"),
        (True, "environment", "ok"),
        (True, "netrc", "ok"),
        (True, "netrc of another host", "error"),
    ],
)
def test_wandb_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool, key: str | None, level: str) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if key == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif key:
        host = "api.wandb.ai" if key == "netrc" else "example.org"
        (tmp_path / "netrc").write_text(f"machine {host} login user password {'0' * 40}\n")
    needs = Needs("fp32", compiled_adam=False, compiled_layers=False, nvme=False, wandb_online=online, disk_bytes=0, output_dir=Path())
    assert levels(doctor.wandb_login(needs, os.environ)) == [level]


def test_stale_launcher_variables() -> None:
    found = {finding.check: finding for finding in doctor.launcher({"RANK": "3"})}
    assert found["launcher"].level == "error"
    assert "WORLD_SIZE is not set" in found["launcher"].message
    assert found["slurm"].level == "ok"


def test_stage_reports_and_fails_as_its_findings_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    recipe = load_recipe("quickstart", ["train.precision=fp32"])
    assert stage.run(recipe, as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["error"] == 0
    assert {"check", "level", "message", "remedy"} == set(report["findings"][0])
    assert {"python", "torch", "compiler", "backend", "disk", "launcher"} <= {finding["check"] for finding in report["findings"]}

    (tmp_path / "shm_comm").mkdir()
    (tmp_path / "shm_comm" / "lock").touch()
    assert stage.run(recipe) == 1
    assert "a killed build left" in capsys.readouterr().out
