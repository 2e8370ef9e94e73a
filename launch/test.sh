#!/usr/bin/env bash
# The gate: format, lint, types, then every test and doctest. With arguments, only pytest, with them:
#
#   launch/test.sh                              everything that a change must pass
#   launch/test.sh tests/schedules -k gpipe     some tests
#   launch/test.sh --whole-grid                 every case of the sampled grids (long)
#
# JAXPIPE_TEST_WORKERS  processes that pytest spreads the tests over (2; 0: this one only)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

failed=""
stage() { # every stage runs, even after one that failed; the gate then fails at its end
  local start=$SECONDS result=ok
  echo "== $*"
  "$python" -m "$@" || { result=FAILED && failed=yes; }
  echo "== $result, $((SECONDS - start)) s"
}

# Whole contiguous runs of tests per worker, so that what one file compiles is shared, and the
# worker that is done first takes over from the other.
tests=(pytest -n "${JAXPIPE_TEST_WORKERS:-2}" --dist worksteal)
if [[ $# -gt 0 ]]; then exec "$python" -m "${tests[@]}" "$@"; fi

stage ruff format --check
stage ruff check
stage mypy
stage "${tests[@]}"
[[ -z $failed ]]
