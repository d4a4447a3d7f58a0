#!/usr/bin/env bash
# Runs a command of vit-jax as several processes of one job on this machine:
#   ./launch/local.sh 2 train --config=configs/tiny.py --workdir=runs/tiny
# Lines are marked with the process that printed them. When one process fails, the others are ended; SIGTERM and Ctrl-C
# go to all of them. The exit code is that of the first process that failed: 75 means saved, the same command resumes.
# GPUs are shared out evenly. PYTHON chooses the interpreter, PORT the coordinator's port (default: a free one). No other
# user of this machine can take part in the job or stop it: its processes know a secret, made here and handed on in the
# environment.
set -uo pipefail

usage() {
  echo "usage: $0 NUM_PROCESSES COMMAND [FLAGS…], for example: $0 2 train --config=configs/tiny.py --workdir=runs/tiny" >&2
  exit 64
}

if ! [[ ${1-} =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then usage; fi
count=$1
shift
python=${PYTHON:-python3}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')} || exit 1
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES=$count PYTHONUNBUFFERED=1
: "${VIT_JAX_JOB_SECRET:=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}"
export VIT_JAX_JOB_SECRET
grace=${GRACE:-60} # seconds that processes have to end when asked to

pids=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$python" -m vit_jax "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done

signal_all() { # SIGNAL: to all that still run
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done
}
trap 'signal_all TERM' TERM
trap 'signal_all INT' INT

code=0 ended=() left=$count deadline=
while ((left > 0)); do
  for ((i = 0; i < count; i++)); do
    [ -n "${ended[$i]-}" ] && continue
    kill -0 "${pids[$i]}" 2>/dev/null && continue
    wait "${pids[$i]}" 2>/dev/null
    ended[i]=$?
    left=$((left - 1))
    if ((ended[i] != 0)); then
      ((code == 0)) && code=${ended[i]}
      ((ended[i] == 75)) || echo "local.sh: process $i ended with exit code ${ended[i]}" >&2
      [ -z "$deadline" ] && deadline=$((SECONDS + grace))
    fi
  done
  if [ -n "$deadline" ] && ((SECONDS >= deadline && left > 0)); then
    echo "local.sh: $left process(es) did not end by themselves within $grace s; killing them" >&2
    signal_all KILL
    deadline=$((SECONDS + 3600))
  fi
  ((left > 0)) && sleep 0.2
done
exit "$code"
