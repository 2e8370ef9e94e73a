"""The first call of a launcher installs, and says at every step what it does."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"

# A Python that makes an environment of links to itself, and installs nothing. Its base interpreter,
# which the setup asks for, is itself.
STAND_IN = f"""#!/bin/sh
case "$*" in
  *ensurepip*) echo "3.11 with $0" ;;
  "-m venv "*) mkdir -p "$3/bin" && ln -s "$0" "$3/bin/python" ;;
  *pip_install.py*) shift && echo "installed $*" ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def setup(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """Runs a script by `local.sh`, in an environment of the stand-in's."""
  python, script = folder / "python", folder / "script.py"
  python.write_text(STAND_IN)
  python.chmod(0o755)
  script.write_text("print('ran')")
  kept = {k: v for k, v in os.environ.items() if not k.startswith("JAXPIPE_")}
  env = {**kept, "JAXPIPE_PYTHON": str(python), "JAXPIPE_VENV": str(folder / "venv")}
  command = [LAUNCH / "local.sh", script]
  return subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)


def test_each_step_is_a_plain_line_and_a_second_call_says_nothing(tmp_path: pathlib.Path) -> None:
  first = setup(tmp_path)
  assert first.returncode == 0, first.stderr
  pins = len(re.findall("==.*\\\\$", (LAUNCH.parent / "requirements.lock").read_text(), re.M))
  lines = first.stderr.splitlines()
  assert lines[0].startswith("setup: installing requirements.lock and jaxpipe into ")
  assert [line.partition(":")[2] for line in lines[1:4]] == [
    " step 1 of 3: an empty environment",
    f" step 2 of 3: the {pins} packages of requirements.lock",
    " step 3 of 3: jaxpipe itself",
  ]
  assert re.fullmatch(r"setup: done in \d+ s", lines[4]) and len(lines) == 5
  assert all(line.isprintable() for line in lines)
  installed = first.stdout.splitlines()
  assert installed[0].startswith(f"installed {pins} --require-hashes -r ")
  assert installed[1].startswith("installed 0 --no-deps") and installed[2:] == ["ran"]
  second = setup(tmp_path)
  assert (second.returncode, second.stdout, second.stderr) == (0, "ran\n", "")


def test_progress_counts_what_pip_has_found_and_then_unpacked() -> None:
  spec = importlib.util.spec_from_file_location("pip_install", LAUNCH / "pip_install.py")
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  lines = [
    "Looking in links: folder\n",
    "Ignoring jax: markers 'python_full_version >= \"3.12\"' don't match your environment\n",
    "Processing folder/absl_py-2.5.1-py3-none-any.whl (from -r requirements.lock (line 1))\n",
    "Collecting aiofiles==25.1.0 (from -r requirements.lock (line 4))\n",
    "  Downloading aiofiles-25.1.0-py3-none-any.whl (14 kB)\n",
  ]
  assert module.progress(lines, 5, 0) == "found 3 of 5 packages"
  assert module.progress(lines, 0, 0) == "found 3 packages"
  lines.append("Installing collected packages: absl-py, aiofiles\n")
  assert module.progress(lines, 5, module.installed() - 1) == "unpacked 1 of 2 packages"


def test_of_a_pip_that_fails_its_words_and_its_status_remain() -> None:
  command = [sys.executable, LAUNCH / "pip_install.py", "1", "--no-index", "no-such-package==1"]
  done = subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)
  assert done.returncode == 1 and not done.stdout
  assert "No matching distribution found for no-such-package==1" in done.stderr
