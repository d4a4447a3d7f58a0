#!/usr/bin/env bash
# Installs the package into .venv and pretrains a small ViT on embedded data, on whatever device there is (a CPU will
# do). The same command again resumes the run, or says that it is complete. Overrides go to the run:
#   ./launch/quickstart.sh --config.seed=1 --workdir=runs/seed1
set -euo pipefail
# shellcheck source=launch/environment.sh disable=SC1091
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare tensorboard
cd "$root"
workdir=runs/quickstart
for argument in "$@"; do
  case $argument in --workdir=*) workdir=${argument#--workdir=} ;; esac
done
vit-jax train --config=configs/quickstart.py --workdir="$workdir" "$@"

echo
echo "The run is in $(cd "$workdir" && pwd):"
find "$workdir" -maxdepth 1 -mindepth 1 -exec basename {} \; | sort | sed 's/^/  /'
echo "Read first:  $workdir/summary.md"
echo "Its curves:  .venv/bin/pip install tensorboard && .venv/bin/tensorboard --logdir=$workdir"
echo "Its scores:  .venv/bin/vit-jax evaluate --model=$workdir --tasks=knn,linear '--data=embedded:textures?size=64'"
