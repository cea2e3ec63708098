#!/usr/bin/env bash
# The checks that every change must pass: style, types, and the default tier of tests.
#
#     ./launch/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment

say "ruff"
ruff check .
ruff format --check .
say "mypy"
mypy
say "pytest"
# Two at a time, each file's tests in one of them: their fixtures are made once. One thread each, since most compute little.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 --dist loadfile "$@"
