#!/usr/bin/env bash
# A Cloud TPU VM slice, all of its workers, from nothing to a run.  docs/training.md walks through it.
#
#   export NAME=readme ZONE=us-east5-a TYPE=v5p-32 SHARE=10.0.0.2:/vol1     # SHARE: an NFS export (Filestore)
#   train/launch/tpu_vm.sh create                 the slice; SPOT=1 for a spot one
#   train/launch/tpu_vm.sh setup                  this checkout, Python and the share, on every worker
#   train/launch/tpu_vm.sh run alternate --config configs/llama2-7b-paper/alternate.yaml
#   train/launch/tpu_vm.sh log                    the log of worker 0 as it grows
#   train/launch/tpu_vm.sh stop                   every process saves itself at the next step and ends
#   train/launch/tpu_vm.sh delete
#
# `run` returns at once: the program goes on when the connection is lost. A run that loses a process (exit code 76, or a
# kill) starts again by itself and goes on from its last checkpoint; bad input (2) and `stop` (75) end it.
set -euo pipefail
: "${NAME:?name of the slice}" "${ZONE:?zone, such as us-east5-a}"
IMAGE=${IMAGE:-v2-alpha-tpuv5}        # v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv6e for v6e
WORK=/mnt/readme                      # where the share is mounted: all paths of a run are relative to it

on_workers() { gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker="$1" --command "$2"; }

case ${1:-} in
create)
  : "${TYPE:?accelerator type, such as v5p-32}"
  gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" --version "$IMAGE" ${SPOT:+--spot}
  ;;
setup)
  : "${SHARE:?NFS export that every worker mounts, such as 10.0.0.2:/vol1}"
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
  on_workers 0 "cp -rT readme-jax/configs $WORK/configs"
  ;;
run)
  shift
  on_workers all "
    cd $WORK && rm -f ~/stopped
    export JAX_COMPILATION_CACHE_DIR=~/.cache/jax    # a restart compiles nothing
    setsid nohup bash -c '
      while ~/venv/bin/readme-jax $*; code=\$?; [ \$code != 0 ] && [ \$code != 2 ] && [ \$code != 75 ]; do
        echo \"exit code \$code: started again in 15 s\"; sleep 15; [ -e ~/stopped ] && break
      done' > ~/train.log 2>&1 < /dev/null &"
  ;;
log) on_workers 0 "tail -n 50 -F train.log" ;;
stop) on_workers all "touch ~/stopped; pkill -TERM -f 'venv/bin/[r]eadme-jax'" ;;
delete) gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE" --quiet ;;
*)
  sed -n '2,14p' "$0"
  exit 2
  ;;
esac
