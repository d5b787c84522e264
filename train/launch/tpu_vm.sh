#!/usr/bin/env bash
# Cloud TPU VMs from nothing to a run: a machine of one host, or all hosts of a slice.  docs/training.md walks through it.
#
#   export NAME=readme ZONE=us-east5-a TYPE=v5p-32 SHARE=10.0.0.2:/vol1     # SHARE: an NFS export (Filestore)
#   train/launch/tpu_vm.sh create                 the machine or slice; SPOT=1 for a spot one
#   train/launch/tpu_vm.sh setup                  this checkout, Python and the share, on every host
#   train/launch/tpu_vm.sh put configs/llama2-7b-paper/data.yaml      one file of this checkout, onto the share
#   train/launch/tpu_vm.sh one calibrate --config ...   a stage of one process, on a machine of one host
#   train/launch/tpu_vm.sh run alternate --config ...   training, on every host
#   train/launch/tpu_vm.sh log                    what worker 0 says, as it grows
#   train/launch/tpu_vm.sh stop                   every process saves itself at the next step and ends
#   train/launch/tpu_vm.sh delete
#
# `setup` keeps the files that are in configs/ of the share; `put` replaces one. `one` shows the stage and ends as it
# does, `run` returns at once; both go on when the connection is lost. What restart.sh says is started again, is.
set -euo pipefail
: "${NAME:?name of the machine or slice}" "${ZONE:?zone, such as us-east5-a}"
IMAGE=${IMAGE:-v2-alpha-tpuv5}        # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e
WORK=${WORK:-/mnt/readme}             # where the share is mounted: all paths of a run are relative to it
CACHE='export JAX_COMPILATION_CACHE_DIR=~/.cache/jax' # a second start compiles nothing

on_workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker="$1" --command "$2"; }
fail() { echo "error: $1" >&2; exit 2; }

case ${1:-} in
create)
  : "${TYPE:?accelerator type, such as v5p-32}"
  gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$IMAGE" ${SPOT:+--spot}
  ;;
setup)
  : "${SHARE:?NFS export that every host mounts, such as 10.0.0.2:/vol1}"
  root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
  git -C "$root" ls-files -z | tar --null -czf /tmp/readme-jax.tgz -C "$root" -T -    # as edited, committed or not
  gcloud compute tpus tpu-vm scp /tmp/readme-jax.tgz "$NAME": --zone "$ZONE" --worker=all
  on_workers all "
    set -e
    sudo apt-get -qq install -y nfs-common
    sudo mkdir -p $WORK && { mountpoint -q $WORK || sudo mount -t nfs $SHARE $WORK; } && sudo chown \$USER $WORK
    rm -rf readme-jax && mkdir readme-jax && tar -xzf readme-jax.tgz -C readme-jax
    command -v ~/.local/bin/uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv --clear --python 3.12 venv
    VIRTUAL_ENV=venv ~/.local/bin/uv pip install -e './readme-jax[tpu]'"
  on_workers 0 "tar --skip-old-files -xzf readme-jax.tgz -C $WORK configs"
  ;;
put)
  file=${2:?file, such as configs/llama2-7b-paper/data.yaml}
  gcloud compute tpus tpu-vm scp "$file" "$NAME:$WORK/$file" --zone "$ZONE" --worker=0
  ;;
one)
  shift
  [ "${1:-}" != alternate ] || fail "alternate is started by run"
  hosts=$(gcloud compute tpus tpu-vm describe "$NAME" --zone "$ZONE" --format json | grep -c '"ipAddress"')
  # On one host of a slice libtpu waits for the other hosts, without end.
  [ "$hosts" = 1 ] || fail "$NAME has $hosts hosts, ${1:-a stage} is one process: take a machine of one host, such as v5p-8"
  on_workers 0 "
    cd $WORK && $CACHE
    setsid nohup ~/venv/bin/readme-jax $(printf '%q ' "$@") > ~/train.log 2>&1 < /dev/null &
    tail --pid=\$! -n +1 -F ~/train.log; wait \$!"
  ;;
run)
  shift
  [ "${1:-}" = alternate ] || fail "run starts alternate on every host; ${1:-a stage} is one process: use one"
  on_workers all "
    cd $WORK && $CACHE && rm -f ~/stopped
    setsid nohup ~/readme-jax/train/launch/restart.sh ~/venv/bin/readme-jax $(printf '%q ' "$@") > ~/train.log 2>&1 < /dev/null &"
  ;;
log) on_workers 0 "tail -n 50 -F train.log" ;;
stop) on_workers all "touch ~/stopped; pkill -TERM -f 'venv/bin/[r]eadme-jax'" ;;
delete) gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" --quiet ;;
*)
  sed -n '2,17p' "$0"
  exit 2
  ;;
esac
