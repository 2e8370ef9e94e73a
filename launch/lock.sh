#!/usr/bin/env bash
# Writes requirements.lock anew: what the project and its extras `dev` and `experiments` need on a CPU,
# with hashes.
# One file serves every Python: environment markers pin the oldest supported JAX for Python 3.11
# and the newest one for later Pythons. No index address goes into it.
# Versions already locked stay as they are; `launch/lock.sh --upgrade` takes the newest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
"${JAXPIPE_PYTHON:-python3}" -m venv "$tool"
"$tool/bin/pip" install -q uv
"$tool/bin/uv" pip compile pyproject.toml --extra dev --extra experiments --universal --python-version 3.11 \
  --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --output-file requirements.lock "$@" >/dev/null
echo "requirements.lock: $(grep -c '==' requirements.lock) pins"
