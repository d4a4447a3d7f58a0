#!/usr/bin/env bash
# Runs a command with the compiler options of a kind of device (and a CPU's of the C library), and prints what it sets:
#   ./launch/xla.sh gpu vit-jax train --config=configs/dinov3_vits16.py --workdir=runs/vits16
#   ./launch/xla.sh tpu vit-jax train …
#   ./launch/xla.sh cpu vit-jax train …
# gpu: hide the latency of collectives behind compute, combine small ones, pipeline those of the scan over the blocks.
# tpu: the same, asynchronous and fused with compute (LIBTPU_INIT_ARGS). cpu: vectors of 512 bits where the CPU has them;
# and memory once freed stays with the process. XLA asks for the temporaries of a step anew in each, and glibc would give
# them back to the system in between, which then fills them with zeros again, page by page.
# What is set already wins. Nothing else in this project sets such options.
# An option that XLA or libtpu does not know ends the process; a test asks the installed ones whether they know all.
# cpu: a step of ViT-S in 0.83 to 0.88 of the time, and up to three times the memory for temporaries (1.1 to 2.3 GiB; it
# does not grow further); of this, wider vectors are at most 0.04. gpu and tpu: what JAX and MaxText advise, not measured
# here.
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: $0 gpu|tpu|cpu COMMAND [FLAGS…]" >&2
  exit 64
fi
preset=$1
shift
gpu=(
  --xla_gpu_enable_latency_hiding_scheduler=true
  --xla_gpu_all_gather_combine_threshold_bytes=134217728
  --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
  --xla_gpu_all_reduce_combine_threshold_bytes=134217728
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_pipelined_all_reduce=true
  --xla_gpu_enable_while_loop_double_buffering=true
)
tpu=(
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
cpu=()
if grep -qs -m1 -w avx512f /proc/cpuinfo; then cpu=(--xla_cpu_prefer_vector_width=512); fi
# One heap instead of one a thread, as only the first can hold large blocks; no block outside it; never made smaller.
heap=(MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_TOP_PAD_=268435456)

case $preset in
gpu) export XLA_FLAGS="${gpu[*]} ${XLA_FLAGS-}" ;;
tpu) export LIBTPU_INIT_ARGS="${tpu[*]} ${LIBTPU_INIT_ARGS-}" ;;
cpu)
  export XLA_FLAGS="${cpu[*]-} ${XLA_FLAGS-}"
  for setting in "${heap[@]}"; do
    name=${setting%%=*}
    if [ -z "${!name-}" ]; then export "${setting?}"; fi
  done
  ;;
*)
  echo "$0: there is no preset '$preset': gpu, tpu or cpu" >&2
  exit 64
  ;;
esac
echo "xla.sh: XLA_FLAGS=${XLA_FLAGS-} LIBTPU_INIT_ARGS=${LIBTPU_INIT_ARGS-}$(env | grep ^MALLOC_ | sed 's/^/ /' | tr -d '\n')" >&2
exec "$@"
