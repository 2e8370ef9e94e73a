# Sourced by setup.sh: defines `find_python`, and how the launchers' setup reports.

die() { echo "${0##*/}: $1" >&2 && exit 2; }
say() { echo "setup: $1" >&2; }

# Sets `python` to the first Python that will do. To the base interpreter of it, since an activated
# environment may be the one that is to be made anew.
find_python() {
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
