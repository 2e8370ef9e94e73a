#!/usr/bin/env bash
# Runs an experiment on this machine, its CPU split into N devices that JAX takes for real ones:
#
#   launch/local.sh [--devices=N] SCRIPT [flags of the script]        (N is 4 unless given)
#
# JAX_PLATFORMS, if set, stays: JAX_PLATFORMS=cuda runs on the machine's own GPUs.
# The first call installs what is needed; setup.sh says how to change where and with what.
set -euo pipefail

usage() {
  echo "local.sh: $1; usage: launch/local.sh [--devices=N] SCRIPT [flags of the script]" >&2
  exit 2
}

devices=4
while [[ ${1-} == -* ]]; do
  case $1 in
    --devices=*) devices=${1#*=} ;;
    *) usage "unknown launcher flag $1 (the script's own flags follow its name)" ;;
  esac
  shift
done
[[ $devices =~ ^[1-9][0-9]{0,3}$ ]] || usage "--devices=$devices is not a number of devices"
[[ $# -gt 0 ]] || usage "no script given"
repository=$(dirname "${BASH_SOURCE[0]}")/..
script=$1
[[ -f $script ]] || script=$repository/$1 # experiments/lm.py means the same from any folder
[[ -f $script ]] || usage "no such script: $1"
shift

source "$repository/launch/setup.sh"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONUNBUFFERED=1
export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$devices" # the last one wins
exec "$python" "$script" "$@" # exec: Ctrl-C and exit codes go straight through
