#!/usr/bin/env bash
# Installs the package with what its tests need into .venv and runs them. Further arguments go to pytest:
#   ./launch/test.sh                     all but the slow ones
#   ./launch/test.sh -m slow             the slow ones
#   ./launch/test.sh tests/losses -x     a folder, stopping at the first failure
set -euo pipefail
# shellcheck source=launch/environment.sh disable=SC1091
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare test
export JAX_PLATFORMS=cpu
export VIT_JAX_CACHE="${VIT_JAX_CACHE:-$root/.cache/data}"
cd "$root"
python -m pytest -n 2 --dist loadfile "$@"
