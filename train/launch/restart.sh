#!/usr/bin/env bash
# Run a command, and run it again when it ended by what may pass: a lost process (exit code 76), an unexpected error
# (70), a kill, whatever is not named here. Success (0), bad input (2) and a stop that was asked for (75) end it, as do
# the file ~/stopped and TRIES (5) starts in a row of which none finished a checkpoint.  tpu_vm.sh starts it on each host.
#
#   cd FOLDER && restart.sh readme-jax alternate --config configs/llama2-7b-paper/alternate.yaml
#
# Checkpoints are looked for below the folder it is started in: every new one is a folder with a number of its own.
tries=${TRIES:-5} wait=${WAIT:-15} failed=0
if [ $# = 0 ]; then sed -n '2,8p' "$0"; exit 2; fi
checkpoints() { find -L . -path '*/checkpoints/*/whole.json' 2> /dev/null | sort; }

while true; do
  before=$(checkpoints)
  "$@"
  code=$?
  case $code in 0 | 2 | 75) exit $code ;; esac
  if [ "$(checkpoints)" != "$before" ]; then failed=0; else failed=$((failed + 1)); fi
  if [ "$failed" -ge "$tries" ]; then
    echo "exit code $code: $failed starts in a row finished no checkpoint; not started again" >&2
    exit $code
  fi
  echo "exit code $code: started again in $wait s" >&2
  sleep "$wait"
  if [ -e ~/stopped ]; then exit 75; fi
done
