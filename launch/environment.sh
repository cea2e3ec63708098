# Makes the project's virtual environment, or finds it made. To be sourced:
#
#     source launch/environment.sh && prepare_environment
#
# makes .venv at the root of the repository with all extras and the versions of launch/constraints.txt, and puts it first on PATH.
# Run again it installs nothing; after an interruption, or a change of versions, it repairs what is there.
#
# Variables that change it:
#   LARGEFORMER_PYTHON        the Python to build with              (default: the first of python3.11, 3.12, 3.13, python3)
#   LARGEFORMER_TORCH         the version of PyTorch                (default: 2.13.0)
#   LARGEFORMER_TORCH_INDEX   a package index for PyTorch alone     (default: pip's own; PyTorch keeps one for each CUDA version, and one for CPUs)

LARGEFORMER_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf 'largeformer: %s\n' "$*" >&2; }

# fail SENTENCE [APT-PACKAGES DNF-PACKAGES CONDA-PACKAGES]: what is missing, and how to get it.
fail() {
    say "$1"
    if [ $# -gt 1 ]; then
        say "  Debian, Ubuntu:   sudo apt-get install $2"
        say "  Fedora, RHEL:     sudo dnf install $3"
        say "  without root:     conda create -n largeformer -c conda-forge $4 && conda activate largeformer"
    fi
    return 1
}

# Prints a Python of version 3.11 or newer.
find_python() {
    local candidate
    for candidate in ${LARGEFORMER_PYTHON:-python3.11 python3.12 python3.13 python3}; do
        # A name on PATH may be a shim of a version manager that leads nowhere: only what runs counts.
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    if [ -n "${LARGEFORMER_PYTHON:-}" ]; then
        fail "LARGEFORMER_PYTHON=$LARGEFORMER_PYTHON is not a Python 3.11 or newer that runs; name another, or unset it"
    else
        fail "no Python 3.11 or newer is here (looked for python3.11, python3.12, python3.13, python3)" \
            "python3 python3-venv python3-dev" "python3.11 python3.11-devel" "python=3.11 gxx"
    fi
}

# DeepSpeed compiles its kernels on first use: on a CPU that needs a C++ compiler and Python's headers.
check_tools() {
    local python=$1 version compiler=""
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module" "python$version-venv" "python$version" "python=$version" || return
    for compiler in "${CXX:-}" c++ g++ clang++; do
        [ -n "$compiler" ] && command -v "$compiler" >/dev/null && break
        compiler=""
    done
    [ -n "$compiler" ] || fail "no C++ compiler is here (looked for \$CXX, c++, g++, clang++)" "g++" "gcc-c++" "gxx" || return
    "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        fail "$python has no headers (Python.h), which compiled kernels need" "python$version-dev" "python$version-devel" "python=$version"
}

# What the environment was made from: if any of it changes, it is made again.
environment_stamp() {
    {
        cat "$LARGEFORMER_ROOT/pyproject.toml" "$LARGEFORMER_ROOT/launch/constraints.txt"
        echo "$LARGEFORMER_ROOT ${LARGEFORMER_TORCH:-2.13.0} ${LARGEFORMER_TORCH_INDEX:-}"
    } | cksum
}

# run_quietly WHAT COMMAND...: the output goes to a log, and to the terminal only if the command fails.
run_quietly() {
    local what=$1 log="$LARGEFORMER_ROOT/.venv/install.log"
    shift
    if ! "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "$what failed; the whole log is $log"
    fi
}

install_packages() {
    local pip=("$LARGEFORMER_ROOT/.venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off)
    local torch=${LARGEFORMER_TORCH:-2.13.0} index=()
    [ -n "${LARGEFORMER_TORCH_INDEX:-}" ] && index=(--index-url "$LARGEFORMER_TORCH_INDEX")
    say "[2/3] PyTorch $torch"
    run_quietly "installing torch $torch" "${pip[@]}" "torch==$torch" ${index[@]+"${index[@]}"} || return
    say "[3/3] largeformer and the other packages (a minute or two)"
    # The kernels that a run needs are compiled when it first needs them, never all of them here.
    DS_BUILD_OPS=0 run_quietly "installing largeformer" "${pip[@]}" -c "$LARGEFORMER_ROOT/launch/constraints.txt" -e "$LARGEFORMER_ROOT[test]"
}

prepare_environment() {
    local venv="$LARGEFORMER_ROOT/.venv" python stamp
    stamp="$(environment_stamp)"
    if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$stamp" ] || ! "$venv/bin/python" -c 'import sys' 2>/dev/null; then
        python="$(find_python)" || return
        check_tools "$python" || return
        rm -f "$venv/made-from"
        if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            say "[1/3] a virtual environment in .venv, with $python"
            mkdir -p "$venv" && "$python" -m venv --clear "$venv" || fail "no virtual environment could be made in $venv" || return
        else
            say "[1/3] the virtual environment in .venv is there: completing it"
        fi
        install_packages || return
        echo "$stamp" >"$venv/made-from"
        say "the environment is ready"
    fi
    export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" DS_BUILD_OPS=0
}
