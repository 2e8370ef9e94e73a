"""Installs packages by pip into this interpreter's environment, and shows how far it is.

    python launch/pip_install.py COUNT [arguments of `pip install`]

COUNT: packages that are to come, 0 if unknown. Progress goes to standard error, on a terminal as
one line that changes, elsewhere as plain lines. What pip prints is shown only if it fails.
"""

import pathlib
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

_ON_TERMINAL = sys.stderr.isatty()
_EVERY = 1.0 if _ON_TERMINAL else 5.0  # seconds between two lines of progress
# How pip begins the line of a package that it has found, or that need not be installed.
_FOUND = ("Collecting ", "Processing ", "Ignoring ", "Requirement already satisfied: ")


def installed() -> int:
  """Counts the packages of the environment."""
  return len(list(pathlib.Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info")))


def progress(lines: list[str], count: int, before: int) -> str:
  """Words what pip has done by now, from the lines that it has printed so far."""
  # After this line it prints nothing for most of the time that it takes.
  unpacking = [line for line in lines if line.startswith("Installing collected packages:")]
  if unpacking:
    return f"unpacked {installed() - before} of {unpacking[0].count(',') + 1} packages"
  found = sum(line.startswith(_FOUND) for line in lines)
  return f"found {found}{f' of {count}' if found <= count else ''} packages"


def main(count: int, arguments: list[str]) -> int:
  """Runs pip; returns its exit status."""
  signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends both, without a traceback of this one
  command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
  before, began = installed(), time.monotonic()
  with tempfile.NamedTemporaryFile("r", errors="replace") as log, open(log.name, "a") as end:
    pip = subprocess.Popen([*command, "--progress-bar=off"], stdout=end, stderr=end)
    while pip.poll() is None:
      try:
        pip.wait(_EVERY)
      except subprocess.TimeoutExpired:
        log.seek(0)
        done = progress(log.readlines(), count, before)
        text = f"setup: {done} ({time.monotonic() - began:.0f} s)"
        print(text, end="   \r" if _ON_TERMINAL else "\n", file=sys.stderr, flush=True)
    if pip.returncode:
      log.seek(0)
      sys.stderr.writelines(log.readlines()[-30:])
  return pip.returncode


if __name__ == "__main__":
  sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
