#!/usr/bin/env bash
# Runs an experiment on this machine, its CPU split into N devices that JAX takes for real ones:
#
#   launch/local.sh [--devices=N] [--processes=K] [--dry_run] SCRIPT [flags of the script]
#
# N is 4 unless given: the devices of all K processes together, N / K of each. K is 1; more of them
# meet over loopback, as they would on K machines, and only the first prints to standard output.
# When one fails the others are ended, and its status is returned. --dry_run prints what would run.
# JAX_PLATFORMS, if set, stays: JAX_PLATFORMS=cuda runs on the machine's own GPUs.
# The first call installs what is needed; setup.sh says how to change where and with what.
set -euo pipefail

usage() {
  echo "local.sh: $1; usage: launch/local.sh [--devices=N] [--processes=K] SCRIPT [its flags]" >&2
  exit 2
}

devices=4 processes=1 dry_run=""
while [[ ${1-} == -* ]]; do
  case $1 in
    --devices=*) devices=${1#*=} ;;
    --processes=*) processes=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    *) usage "unknown launcher flag $1 (the script's own flags follow its name)" ;;
  esac
  shift
done
[[ $devices =~ ^[1-9][0-9]{0,3}$ ]] || usage "--devices=$devices is not a number of devices"
[[ $processes =~ ^[1-9][0-9]{0,2}$ ]] || usage "--processes=$processes is not a number of processes"
((devices % processes == 0)) || usage "--devices=$devices cannot be shared by --processes=$processes"
[[ $# -gt 0 ]] || usage "no script given"
repository=$(dirname "${BASH_SOURCE[0]}")/..
script=$1
[[ -f $script ]] || script=$repository/$1 # experiments/lm.py means the same from any folder
[[ -f $script ]] || usage "no such script: $1"
shift

python=python
[[ $dry_run ]] || source "$repository/launch/setup.sh"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} PYTHONUNBUFFERED=1 # below: the last flag wins
export XLA_FLAGS="${XLA_FLAGS-} --xla_force_host_platform_device_count=$((devices / processes))"
run=("$python" "$script" "$@")
if [[ $dry_run ]]; then run=(echo "JAX_PLATFORMS=$JAX_PLATFORMS XLA_FLAGS='${XLA_FLAGS# }'" "${run[@]}"); fi
((processes > 1)) || exec "${run[@]}" # exec: Ctrl-C and exit codes go straight through

source "$repository/launch/fan_out.sh"
