# Sourced by the other scripts: sets `root` and `python`, an interpreter with jaxpipe installed.
#
# JAXPIPE_PYTHON    the Python to build on (otherwise the first of python3, python3.11 ... >= 3.11)
# JAXPIPE_VENV      the environment to create or reuse (otherwise .venv in the repository)
# JAXPIPE_NO_SETUP  set: install nothing, run JAXPIPE_PYTHON (otherwise python3) as it is
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${JAXPIPE_PYTHON:-python3}
if [[ -n ${JAXPIPE_NO_SETUP-} ]]; then return; fi
source "$root/launch/find_python.sh" # defines die, say and find_python

find_python
venv=${JAXPIPE_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
venv=${venv%/}
mkdir -p "$(dirname "$venv")"
exec 9>>"$venv.lock" # held until descriptor 9 is closed: one setup at a time
lock='import fcntl, sys; fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1:] else 0))'
"$python" -c "$lock" at_once 2>/dev/null || { say "waiting for another setup of $venv" && "$python" -c "$lock"; }

# The folder is part of the stamp because an editable install points back at it.
stamp=$("$python" -c 'import sys, hashlib; parts = [open(f, "rb").read() for f in sys.argv[2:]]
print("%d.%d.%d" % sys.version_info[:3], hashlib.sha256(b"".join(parts) + sys.argv[1].encode()).hexdigest())' \
  "$root" "$root/requirements.lock" "$root/pyproject.toml")
state=$venv/.jaxpipe-setup # the stamp of what was installed, or "incomplete"
seen=$(cat "$state" 2>/dev/null || true)
if [[ $seen != "$stamp" ]]; then
  fresh="" began=$SECONDS pins=$(grep -c '==' "$root/requirements.lock")
  if [[ ${seen%% *} != "${stamp%% *}" ]]; then fresh=yes; fi # new, half finished, or of another Python
  if [[ $fresh && -z $seen && -n $(ls -A "$venv" 2>/dev/null) ]]; then
    die "$venv was not made by this script; remove it or set JAXPIPE_VENV=/another/folder"
  fi
  say "installing requirements.lock and jaxpipe into $venv (once, a minute or two)"
  if [[ $fresh ]]; then
    mkdir -p "$venv"
    echo incomplete >"$state" # first, so that a killed setup is known for ours by the next one
    find "$venv/" -mindepth 1 ! -name .jaxpipe-setup -delete
    say "step 1 of 3: an empty environment"
    "$python" -m venv "$venv"
  fi
  echo incomplete >"$state"
  install=("$venv/bin/python" "$root/launch/pip_install.py")
  say "step 2 of 3: the $pins packages of requirements.lock"
  "${install[@]}" "$pins" --require-hashes -r "$root/requirements.lock"
  say "step 3 of 3: jaxpipe itself"
  "${install[@]}" 0 --no-deps --no-build-isolation -e "$root"
  echo "$stamp" >"$state"
  say "done in $((SECONDS - began)) s"
fi
exec 9>&-
python=$venv/bin/python
