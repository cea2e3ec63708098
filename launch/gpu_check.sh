#!/usr/bin/env bash
# What only a GPU can show: bf16 and fp16 against fp32, loss scaling, ZeRO 1-3 and offload on it, then the speed of the 1B Llama shape.
#
#     ./launch/gpu_check.sh [section.key=value ...]        the arguments go to `largeformer bench`
#
# Needs no network. Uses LARGEFORMER_PYTHON, else the python3 at hand if its PyTorch sees a GPU, else .venv (made if need be, for
# which LARGEFORMER_TORCH and LARGEFORMER_TORCH_INDEX choose the PyTorch). Where packages are missing, LARGEFORMER_WHEELS may name a folder of wheels:
# they are installed into build/gpu, on top of that Python's own packages. Output is kept in $OUT, by default runs/gpu_check.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

packages="deepspeed megatron.core wandb sentencepiece pydantic yaml typer rich numpy safetensors tensorboard pytest"
# Random tokens, compiled layers, and a batch small enough for every candidate of `bench` to take its turns within minutes.
bench=(-c launch/recipes/llama-1b.yaml "data.sources=[{path: mock}]" train.compile=true train.micro_batch_size=1 train.global_batch_size=8)
out=${OUT:-runs/gpu_check}

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1; }

missing() {
    "$1" - $packages <<'PYTHON'
import importlib.util, sys
def absent(name):
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:
        return True
print(*[name for name in sys.argv[1:] if absent(name)])
PYTHON
}

# Sets $python to one whose PyTorch sees a GPU and that has every package.
choose_python() {
    if [ -n "${LARGEFORMER_PYTHON:-}" ]; then
        python=$LARGEFORMER_PYTHON
    elif sees_gpu python3; then
        python=python3
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        prepare_environment || return
        python="$LARGEFORMER_ROOT/.venv/bin/python"
    else
        fail "no GPU is here (nvidia-smi finds none): nothing can be checked. The default tests need none: ./launch/test.sh"
        return
    fi
    if ! sees_gpu "$python"; then
        fail "the PyTorch of $python sees no GPU: $("$python" -c 'import torch; print(torch.__version__, "built for CUDA", torch.version.cuda)' 2>&1 | tail -n 1)"
        return
    fi
    local absent
    absent=$(missing "$python")
    [ -z "$absent" ] && return
    if [ -z "${LARGEFORMER_WHEELS:-}" ]; then
        fail "$python lacks: $absent. Install them beside its PyTorch, or name a folder of wheels in LARGEFORMER_WHEELS"
        return
    fi
    say "installing what is missing ($absent) from $LARGEFORMER_WHEELS into build/gpu"
    local names=${absent//megatron.core/megatron-core} own="$LARGEFORMER_ROOT/build/gpu/bin/python"
    names=${names//yaml/PyYAML}
    # The environment needs no pip of its own, which some distributions do not ship. What $python sees must be named to it, since
    # $python may itself be an environment, whose packages --system-site-packages would miss.
    "$python" -m venv --clear --without-pip --system-site-packages build/gpu || return
    "$python" -c 'import sys; print(*[path for path in sys.path if path.endswith("-packages")], sep="\n")' \
        >"$("$own" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/inherited.pth" || return
    "$python" -m pip --python "$own" install --quiet --no-index --find-links "$LARGEFORMER_WHEELS" $names || return
    python=$own
}

# step NAME COMMAND...: runs it, keeps its output and says how long it took.
step() {
    local name=$1 begun=$SECONDS status
    shift
    say "$name: $*"
    "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    say "$name: exit code $status after $((SECONDS - begun)) s"
    [ "$status" -eq 0 ] || failed="$failed $name"
}

python="" failed=""
choose_python || exit 1
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# DeepSpeed's launcher and its kernels' build look for ninja on PATH.
PATH="$(dirname "$(command -v "$python")"):$PATH"
export PATH

"$python" - <<'PYTHON' | tee "$out/machine.log"
import torch
gpu = torch.cuda.get_device_properties(0)
print(f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, CUDA {torch.version.cuda}")
PYTHON
step tests "$python" -m pytest -q -m gpu tests/gpu
step bench "$python" -m largeformer bench "${bench[@]}" "$@"
! grep -q "^plain PyTorch does not fit" "$out/bench.log" || failed="$failed bench(nothing to compare with)"

if [ -n "$failed" ]; then
    say "failed:$failed (see $out)"
    exit 1
fi
say "all passed; the output is in $out"
