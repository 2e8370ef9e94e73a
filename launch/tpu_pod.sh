#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU pod, the same command on each of its machines:
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 [--runtime=VERSION] [--dry_run]
#       SCRIPT [flags of the script]
#
# Asks for the pod unless NAME is there already, waits for it, copies the last commit to it, installs
# and runs. --run_dir must be a folder that all machines share (Filestore, or a mounted bucket).
# The pod stays, for the next call; what deletes it is printed at the end. Needs gcloud, logged in.
set -euo pipefail

usage() {
  echo "tpu_pod.sh: $1; usage: launch/tpu_pod.sh --name=N --zone=Z --type=T SCRIPT [its flags]" >&2
  exit 2
}

name="" zone="" type="" runtime=v2-alpha-tpuv5-lite dry_run=""
while [[ ${1-} == -* ]]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    *) usage "unknown launcher flag $1 (the script's own flags follow its name)" ;;
  esac
  shift
done
[[ $name && $zone && $type ]] || usage "--name, --zone and --type say which pod"
[[ $# -gt 0 ]] || usage "no script given"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -f $1 ]] || usage "no such script in the repository: $1"

run() { # says what it does, and does it unless this is a dry run
  printf '%q ' "$@" && echo
  [[ $dry_run ]] || "$@"
}
queue=(gcloud compute tpus queued-resources)
pod=(gcloud compute tpus tpu-vm)
state() { "${queue[@]}" describe "$name" --zone="$zone" --format='value(state.state)' 2>/dev/null; }

if [[ $dry_run ]] || [[ ! $(state) ]]; then
  run "${queue[@]}" create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$runtime"
fi
until [[ $dry_run || $(state) == ACTIVE ]]; do
  [[ ! $(state) =~ FAILED|SUSPENDED ]] || { echo "tpu_pod.sh: $name is $(state)" >&2 && exit 1; }
  sleep 20
done
archive=${TMPDIR:-/tmp}/jaxpipe-$name.tar.gz
run git archive --format=tar.gz --output="$archive" HEAD
run "${pod[@]}" scp "$archive" "$name:jaxpipe.tar.gz" --zone="$zone" --worker=all
install='mkdir -p jaxpipe && tar -xzf jaxpipe.tar.gz -C jaxpipe && cd jaxpipe
  && (test -x .venv/bin/python || (sudo apt-get -qq install python3.11-venv && python3.11 -m venv .venv))
  && .venv/bin/pip install -q -e ".[tpu]"'
command="$(echo $install) && exec .venv/bin/python$(printf ' %q' "$1" --distributed=auto "${@:2}")"
run "${pod[@]}" ssh "$name" --zone="$zone" --worker=all --command="$command"
echo "to delete it: ${queue[*]} delete $name --zone=$zone --force"
