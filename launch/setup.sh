# Sourced by the other scripts: sets `root` and `python`, an interpreter with jaxpipe installed.
#
# JAXPIPE_PYTHON    the Python to build on (otherwise the first of python3, python3.11 ... >= 3.11)
# JAXPIPE_VENV      the environment to create or reuse (otherwise .venv in the repository)
# JAXPIPE_NO_SETUP  set: install nothing, run JAXPIPE_PYTHON (otherwise python3) as it is
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${JAXPIPE_PYTHON:-python3}
if [[ -n ${JAXPIPE_NO_SETUP-} ]]; then return; fi

die() { echo "${0##*/}: $1" >&2 && exit 2; }

find_python() { # the base interpreter: an activated environment may be the one to be made anew
  local candidate version kind found="" candidates=("$python" python3.1{1,2,3,4})
  local probe='import sys; from importlib.util import find_spec
print("%d.%d" % sys.version_info[:2], "with" if find_spec("ensurepip") else "without",
  getattr(sys, "_base_executable", sys.executable))'
  if [[ -n ${JAXPIPE_PYTHON-} ]]; then candidates=("$python"); fi
  for candidate in "${candidates[@]}"; do
    read -r version kind python < <("$candidate" -c "$probe" 2>/dev/null) || continue
    case $version-$kind in 3.1[1-9]-with | 3.[2-9][0-9]-with) return ;; esac
    found+=" $candidate is $version $kind venv,"
  done
  die "needs Python 3.11 or newer with its venv module,${found:- found none,} install one or set JAXPIPE_PYTHON=/path/to/python3.11"
}

find_python
venv=${JAXPIPE_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
venv=${venv%/}
mkdir -p "$(dirname "$venv")"
exec 9>>"$venv.lock" # held until descriptor 9 is closed: one setup at a time
"$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'

# The folder is part of the stamp because an editable install points back at it.
stamp=$("$python" -c 'import sys, hashlib; parts = [open(f, "rb").read() for f in sys.argv[2:]]
print("%d.%d.%d" % sys.version_info[:3], hashlib.sha256(b"".join(parts) + sys.argv[1].encode()).hexdigest())' \
  "$root" "$root/requirements.lock" "$root/pyproject.toml")
state=$venv/.jaxpipe-setup # the stamp of what was installed, or "incomplete"
seen=$(cat "$state" 2>/dev/null || true)
if [[ $seen != "$stamp" ]]; then
  fresh=""
  if [[ ${seen%% *} != "${stamp%% *}" ]]; then fresh=yes; fi # new, half finished, or of another Python
  if [[ $fresh && -z $seen && -n $(ls -A "$venv" 2>/dev/null) ]]; then
    die "$venv was not made by this script; remove it or set JAXPIPE_VENV=/another/folder"
  fi
  echo "setup: installing requirements.lock and jaxpipe into $venv (once, about a minute)" >&2
  if [[ $fresh ]]; then
    mkdir -p "$venv"
    echo incomplete >"$state" # first, so that a killed setup is known for ours by the next one
    find "$venv/" -mindepth 1 ! -name .jaxpipe-setup -delete
    "$python" -m venv "$venv"
  fi
  echo incomplete >"$state"
  pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq)
  "${pip[@]}" --require-hashes -r "$root/requirements.lock"
  "${pip[@]}" --no-deps --no-build-isolation -e "$root"
  echo "$stamp" >"$state"
fi
exec 9>&-
python=$venv/bin/python
