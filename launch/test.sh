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
exec python -m pytest "$@"
