#!/usr/bin/env bash
# A TPU slice by queued resource: asks for it, waits for it, installs this checkout on all its hosts and trains there.
#   PROJECT=my-project ZONE=us-east5-a TYPE=v5p-32 RUNTIME=v2-alpha-tpuv5 ./launch/tpu_vm.sh create my-slice
#   PROJECT=my-project ZONE=us-east5-a ./launch/tpu_vm.sh install my-slice
#   PROJECT=my-project ZONE=us-east5-a ./launch/tpu_vm.sh train my-slice --config=… --workdir=gs://my-bucket/run
#   PROJECT=my-project ZONE=us-east5-a ./launch/tpu_vm.sh delete my-slice
# Needs gcloud, logged in. SPOT=1 asks for cheaper capacity that may be taken away. The hosts of a slice find each other
# by the metadata of their machines, and know each other by a secret, which `train` makes and copies to a file on each.
# `train` prints the lines of all hosts; when the run is preempted or the connection breaks, the same command resumes it
# (exit code 75: saved before it ended). The workdir must be a bucket or a file system that all hosts share. DRY_RUN=1
# prints the gcloud commands instead of running them.
set -euo pipefail

usage() {
  sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 64
}

gcloud_() { # prints in a dry run what it would run
  if [ -n "${DRY_RUN-}" ]; then
    printf 'gcloud'
    printf ' %q' "$@"
    printf '\n'
  else
    gcloud "$@"
  fi
}

on_all_hosts() { # COMMAND
  gcloud_ compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

[ $# -ge 2 ] || usage
action=$1 name=$2
shift 2
where=(--project="${PROJECT:?the cloud project}" --zone="${ZONE:?the zone of the TPU}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
package=$(mktemp -d)
trap 'rm -rf "$package"' EXIT

case $action in
create)
  gcloud_ compute tpus queued-resources create "$name" "${where[@]}" --node-id="$name" \
    --accelerator-type="${TYPE:?the slice, for example v5p-32}" \
    --runtime-version="${RUNTIME:?the TPU software version, for example v2-alpha-tpuv5}" ${SPOT:+--spot}
  state=
  until [ "$state" = ACTIVE ] || [ -n "${DRY_RUN-}" ]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
    echo "$(date +%T) $name: $state"
    case $state in FAILED | SUSPENDED) exit 1 ;; ACTIVE) ;; *) sleep 30 ;; esac
  done
  ;;
install)
  tar -C "$root" --exclude=.git --exclude=.venv --exclude=runs -czf "$package/vit_jax.tgz" .
  gcloud_ compute tpus tpu-vm scp "$package/vit_jax.tgz" "$name:vit_jax.tgz" "${where[@]}" --worker=all
  on_all_hosts 'set -e; mkdir -p vit_jax; tar -C vit_jax -xzf vit_jax.tgz; cd vit_jax; . launch/environment.sh; prepare tpu'
  ;;
train)
  # In a file that only the user reads, as commands show in lists of processes.
  (umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$package/job_secret")
  gcloud_ compute tpus tpu-vm scp "$package/job_secret" "$name:vit_jax/.job_secret" "${where[@]}" --worker=all
  on_all_hosts "cd vit_jax && chmod 600 .job_secret && VIT_JAX_JOB_SECRET=\$(cat .job_secret) .venv/bin/vit-jax train$(printf ' %q' "$@")"
  ;;
delete)
  gcloud_ compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  ;;
*) usage ;;
esac
