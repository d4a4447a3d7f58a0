#!/usr/bin/env bash
# Runs vit-jax under Open MPI, which starts the processes; they find each other without MPI:
#   ./launch/mpi.sh -np 16 --hostfile hosts -- train --config=configs/dinov3_vits16.py --workdir=runs/vits16
# What is before -- goes to mpirun, what is after it to vit-jax. Start it on the machine of rank 0, or set
# JAX_COORDINATOR_ADDRESS=HOST:PORT for it. Several processes on a machine divide its GPUs evenly. When one process fails,
# mpirun ends the others. Exit code 75 means saved, the same command resumes. PYTHON chooses the interpreter. A secret,
# made here and handed on in the environment, keeps others of the cluster out of the job.
set -euo pipefail

before=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  before+=("$1")
  shift
done
if [ $# -lt 2 ]; then
  echo "usage: $0 [MPIRUN FLAGS…] -- COMMAND [FLAGS…], for example: $0 -np 2 -- train --config=… --workdir=…" >&2
  exit 64
fi
shift

: "${VIT_JAX_JOB_SECRET:=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export VIT_JAX_JOB_SECRET
# mpirun passes no variables to other machines unless told to.
exported=()
for name in $(compgen -e | grep -E '^(VIT_JAX_|JAX_|XLA_|NCCL_|CUDA_VISIBLE_DEVICES$|PYTHONPATH$|PATH$|LD_LIBRARY_PATH$)'); do
  exported+=(-x "$name")
done
# Unbound: the threads of a process need more than the one core that mpirun would give it.
exec mpirun --bind-to none --tag-output "${exported[@]+"${exported[@]}"}" "${before[@]+"${before[@]}"}" \
  "${PYTHON:-python3}" -m vit_jax "$@"
