# shellcheck shell=bash
# Sourced by the scripts beside it: makes the virtual environment .venv of this checkout and activates it.
# An environment that is already active is left alone: the scripts pin versions, and it may hold other work.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# The first interpreter that is 3.11 or newer and can make virtual environments.
find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "vit_jax needs Python 3.11, 3.12 or 3.13 with the venv module (on Debian: apt install python3-venv)." >&2
  echo "Found: $(python3 --version 2>/dev/null || echo 'no python3')." >&2
  return 1
}

# prepare EXTRAS: an environment with this checkout (editable) and the extras, at the versions of constraints.txt.
# Installs only when the environment is new or what it is made of has changed.
prepare() {
  local extras=$1 python stamp="$root/.venv/installed-$1"
  if ! [ -x "$root/.venv/bin/python" ]; then
    python=$(find_python) || return 1
    echo "Making $root/.venv with $("$python" --version)"
    "$python" -m venv "$root/.venv" || return 1
  fi
  if ! cat "$root/pyproject.toml" "$root/constraints.txt" | cmp -s - "$stamp"; then
    echo "Installing vit_jax[$extras] into $root/.venv"
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$root/constraints.txt" --editable "${root}[$extras]" || return 1
    cat "$root/pyproject.toml" "$root/constraints.txt" >"$stamp"
  fi
  # shellcheck disable=SC1091
  . "$root/.venv/bin/activate"
  # A modest environment for a laptop: compiled programs are kept between runs.
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
}
