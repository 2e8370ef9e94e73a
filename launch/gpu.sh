#!/usr/bin/env bash
# Runs an experiment on all NVIDIA GPUs of this machine:
#
#   launch/gpu.sh [--dry_run] SCRIPT [flags of the script]
#
# On several machines, start it on each with the flags that let them find each other:
#
#   launch/gpu.sh experiments/lm.py --coordinator=HOST:PORT --process_id=I --num_processes=N ...
#
# The first call installs what is needed into .venv-cuda; without a script, it does only that.
# JAXPIPE_VENV, JAXPIPE_PYTHON and JAXPIPE_NO_SETUP are as for the others, see setup.sh.
set -euo pipefail

dry_run=""
while [[ ${1-} == -* ]]; do
  case $1 in
    --dry_run) dry_run=yes ;;
    *)
      echo "gpu.sh: unknown launcher flag $1; usage: launch/gpu.sh [--dry_run] SCRIPT [its flags]" >&2
      exit 2
      ;;
  esac
  shift
done
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=${1-}
[[ ! $script || -f $script ]] || script=$repository/$1
[[ ! $script || -f $script ]] || { echo "gpu.sh: no such script: $1" >&2 && exit 2; }

export JAXPIPE_VENV=${JAXPIPE_VENV:-$repository/.venv-cuda}
python=$JAXPIPE_VENV/bin/python
if [[ $dry_run ]]; then
  echo "source launch/setup.sh   # makes $JAXPIPE_VENV"
  echo "$python launch/pip_install.py 0 'jax[cuda12]==VERSION'   # that of the jax installed"
  [[ ! $script ]] || echo "JAX_PLATFORMS=cuda $python $script ${*:2}"
  exit
fi

source "$repository/launch/setup.sh"
if [[ ! ${JAXPIPE_NO_SETUP-} ]] && ! "$python" -c 'import jax_cuda12_plugin' 2>/dev/null; then
  # The plugin of the very jax that is there.
  version=$("$python" -c 'import importlib.metadata as m; print(m.version("jax"))')
  say "CUDA and cuDNN for jax $version, many large packages"
  "$python" "$repository/launch/pip_install.py" 0 "jax[cuda12]==$version"
fi
[[ $script ]] || exit 0
export JAX_PLATFORMS=cuda PYTHONUNBUFFERED=1
exec "$python" "$script" "${@:2}"
