"""`launch/local.sh` hands the script its flags and devices, and its exit code and signals back."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

LOCAL = pathlib.Path(__file__).parents[2] / "launch" / "local.sh"


def environment() -> dict[str, str]:
  """Returns one in which nothing is installed: the script runs on this very interpreter."""
  kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
  return kept | {"JAXPIPE_NO_SETUP": "1", "JAXPIPE_PYTHON": sys.executable}


def local(*args: object, cwd: pathlib.Path, **env: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [LOCAL, *map(str, args)],
    cwd=cwd,
    env=environment() | env,
    text=True,
    capture_output=True,
    timeout=60,
    check=False,
  )


def script(folder: pathlib.Path, source: str) -> pathlib.Path:
  path = folder / "script.py"
  path.write_text(source)
  return path


SHOW = """
import os, sys
print(os.environ["XLA_FLAGS"].split(), os.environ["JAX_PLATFORMS"], sys.argv[1:])
"""


@pytest.mark.parametrize("devices", [4, 6])
def test_devices_and_flags_reach_the_script(tmp_path: pathlib.Path, devices: int) -> None:
  flags = [] if devices == 4 else [f"--devices={devices}"]  # 4 is the default
  done = local(*flags, script(tmp_path, SHOW), "--devices=9", "a b", cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (
    f"['--xla_force_host_platform_device_count={devices}'] cpu ['--devices=9', 'a b']\n"
  )


def test_what_the_user_set_stays_and_the_device_count_wins(tmp_path: pathlib.Path) -> None:
  source = "import jax; print(jax.device_count())"
  flags = "--xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=2"
  done = local("--devices=3", script(tmp_path, source), cwd=tmp_path, XLA_FLAGS=flags)
  assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
  done = local(script(tmp_path, SHOW), cwd=tmp_path, XLA_FLAGS=flags, JAX_PLATFORMS="tpu")
  assert flags.split()[0] in done.stdout
  assert " tpu " in done.stdout


@pytest.mark.parametrize("code", [0, 2, 7])
def test_exit_code_passes_through(tmp_path: pathlib.Path, code: int) -> None:
  assert local(script(tmp_path, f"raise SystemExit({code})"), cwd=tmp_path).returncode == code


ONE_OF_SEVERAL = """
import os, sys, time
me = int(sys.argv[-2].removeprefix("--process_id="))
print(me, sys.argv[1:], os.environ["XLA_FLAGS"][-2:], flush=True)
os.write(2, f"error {me}\\n".encode())  # a whole line: print() of two of them may mix
"""


def test_processes_share_the_devices_and_the_first_alone_prints(tmp_path: pathlib.Path) -> None:
  done = local("--devices=6", "--processes=3", script(tmp_path, ONE_OF_SEVERAL), "-x", cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  assert sorted(re.findall(r"error \d", done.stderr)) == ["error 0", "error 1", "error 2"]
  (port,) = re.findall(r"--coordinator=127\.0\.0\.1:(\d+)", done.stdout)
  where = ["-x", f"--coordinator=127.0.0.1:{port}", "--process_id=0", "--num_processes=3"]
  assert done.stdout == f"0 {where} =2\n"


@pytest.mark.parametrize("failing", [0, 1])
def test_one_that_fails_ends_all_with_its_status(tmp_path: pathlib.Path, failing: int) -> None:
  # The others leave when they see it, as they do when a peer is gone.
  source = f"""{ONE_OF_SEVERAL}
gone = {str(tmp_path / "gone")!r}
if me == {failing}:
  open(gone, "w").close()
  raise SystemExit(7)
while not os.path.exists(gone):
  time.sleep(0.01)
raise SystemExit(0)
"""
  assert local("--processes=2", script(tmp_path, source), cwd=tmp_path).returncode == 7


def test_one_that_hangs_when_another_failed_is_killed_in_silence(tmp_path: pathlib.Path) -> None:
  source = f"""{ONE_OF_SEVERAL}
import signal
if me:
  raise SystemExit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
  done = local("--processes=2", script(tmp_path, source), cwd=tmp_path)
  # The shell that kills it would say so, beside the one line that is said of what is wrong.
  assert (done.returncode, sorted(done.stderr.splitlines())) == (3, ["error 0", "error 1"])


def test_interrupt_reaches_every_process_once(tmp_path: pathlib.Path) -> None:
  source = f"""{ONE_OF_SEVERAL}
import signal
def caught(number, frame):
  with open({str(tmp_path / "caught")!r}, "a") as file:
    file.write(f"{{me}} {{number}}\\n")
signal.signal(signal.SIGINT, caught)
open({str(tmp_path)!r} + f"/ready{{me}}", "w").close()
while not os.path.exists({str(tmp_path / "go")!r}):
  time.sleep(0.01)
raise SystemExit(130)
"""
  command = [LOCAL, "--processes=2", script(tmp_path, source)]
  with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL) as running:
    wait_until(lambda: all((tmp_path / f"ready{i}").exists() for i in range(2)))
    running.send_signal(signal.SIGINT)
    wait_until(lambda: (tmp_path / "caught").exists() and len(caught(tmp_path)) == 2)
    (tmp_path / "go").touch()
    assert running.wait(timeout=30) == 130
  assert sorted(caught(tmp_path)) == [f"{i} {int(signal.SIGINT)}" for i in range(2)]


def caught(folder: pathlib.Path) -> list[str]:
  return (folder / "caught").read_text().splitlines()


def wait_until(good: Callable[[], bool]) -> None:
  end = time.monotonic() + 30
  while not good():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_interrupt_reaches_the_script(tmp_path: pathlib.Path) -> None:
  source = """
import time
try:
  print("ready")
  time.sleep(60)
except KeyboardInterrupt:
  raise SystemExit(5)
"""
  command = [LOCAL, script(tmp_path, source)]
  with subprocess.Popen(command, env=environment(), text=True, stdout=subprocess.PIPE) as running:
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"  # unbuffered, or this would wait for the end
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=30) == 5


@pytest.mark.parametrize(
  ("args", "names"),
  [
    (["--device=4", "script.py"], "--device=4"),
    (["--devices", "4", "script.py"], "--devices"),
    (["--devices=", "script.py"], "--devices="),
    (["--devices=0", "script.py"], "--devices=0"),
    (["--devices=two", "script.py"], "--devices=two"),
    (["--devices=2"], "no script"),
    ([], "no script"),
    (["absent.py"], "absent.py"),
    (["--processes=0", "script.py"], "--processes=0"),
    (["--processes=3", "script.py"], "--devices=4 cannot be shared by --processes=3"),
  ],
)
def test_bad_arguments_get_one_line_and_exit_2(
  tmp_path: pathlib.Path, args: list[str], names: str
) -> None:
  script(tmp_path, "print('ran')")
  done = local(*args, cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1
  assert names in done.stderr


def test_a_script_of_the_repository_is_found_from_anywhere(tmp_path: pathlib.Path) -> None:
  # Any script does; this one is sure to be there, and says that it is no program.
  done = local("tests/launch/test_local.py", cwd=tmp_path)
  assert done.returncode == 0, done.stderr


def test_an_old_python_gets_one_line_with_its_version_and_the_remedy(
  tmp_path: pathlib.Path,
) -> None:
  old = tmp_path / "old"
  old.write_text(f"#!/bin/sh\necho 3.9 with {old}\n")
  old.chmod(0o755)
  env = environment() | {"JAXPIPE_PYTHON": str(old), "JAXPIPE_VENV": str(tmp_path / "venv")}
  del env["JAXPIPE_NO_SETUP"]
  command = [LOCAL, script(tmp_path, "")]
  done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=60, check=False)
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert "3.9" in done.stderr and "JAXPIPE_PYTHON=" in done.stderr
  assert not (tmp_path / "venv").exists()
