"""The training step compiled for a TPU that is not there: the script, from outside."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed; .venv/bin/pip install -e '.[tpu]'",
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, str(ROOT / "experiments" / "compile_tpu.py"), *words]
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
  environment = {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": ""}
  return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_tiny_model_compiles_and_is_described(tmp_path: pathlib.Path, schedule: str) -> None:
  done = run("--preset=tiny", f"--schedule={schedule}", "--format=json", f"--out={tmp_path}/r.json")
  assert done.returncode == 0, done.stderr
  report = json.loads((tmp_path / "r.json").read_text())
  assert report["device"] == "TPU v5" and report["parameters"] == 295488
  memory = report["memory"]
  # Arrays as small as these take tiles several times their size: the report cannot be near.
  assert memory["fits"] and -0.8 < memory["error"] < 0.2
  assert [copy for copy in report["ring_copies"] if not copy["moved"]] == []
  # Parameters and the two moments, the batch, and what tiles of 128 add to small arrays.
  held = memory["predicted"]["parameters"] + memory["predicted"]["optimizer"]
  assert held <= memory["compiler"]["arguments"] <= 1.5 * held
  assert len(report["permutes"]) >= 2
  for permute in report["permutes"]:
    assert permute["asynchronous"] and permute["conditional"] is None
  assert report["cycles"]["every_tick"]["most"] > 0


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  "words",
  [
    ("--schedule=zb-v", "--residuals=all"),
    ("--schedule=1f1b", "--head=sharded"),
    ("--schedule=1f1b", "--recompute"),
    ("--schedule=chimera", "--slack=1"),
  ],
)
def test_no_ring_is_copied(tmp_path: pathlib.Path, words: tuple[str, ...]) -> None:
  """Gradient rings were re-laid out, and R copied the pools that it reads and writes."""
  # In float32 a TPU multiplies what it has rounded to bfloat16, and rounds whole pools for W.
  options = ("--preset=tiny", "--layers=8", "--dtype=bfloat16", "--unroll=none", "--format=json")
  done = run(*options, *words, f"--out={tmp_path}/r.json")
  assert done.returncode == 0, done.stderr
  copies = json.loads((tmp_path / "r.json").read_text())["ring_copies"]
  assert [copy for copy in copies if not copy["moved"]] == []


@needs_libtpu
def test_an_unknown_topology_exits_2_with_one_line() -> None:
  done = run("--topology=v99:2x2")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.count("\n") == 1 and "--topology=v99:2x2" in done.stderr


@needs_libtpu
def test_layers_that_do_not_fill_the_stages_exit_2_with_one_line() -> None:
  done = run("--preset=tiny", "--layers=6")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "--layers=6 --mesh=stage:4: 6 layers cannot fill 4 stages evenly" in done.stderr


def test_without_libtpu_it_says_what_to_install(tmp_path: pathlib.Path) -> None:
  # An empty name in sys.modules is how Python is told that a module is not there.
  code = "import sys, runpy; sys.modules['libtpu'] = None; sys.argv = sys.argv[1:]\n"
  code += "runpy.run_path(sys.argv[0], run_name='__main__')"
  command = [sys.executable, "-c", code, str(ROOT / "experiments" / "compile_tpu.py")]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 2 and ".venv/bin/pip install -e '.[tpu]'" in done.stderr


def test_an_unknown_flag_exits_2_with_one_line() -> None:
  done = run("--topologie=v5p:2x2x1")
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "did you mean --topology?" in done.stderr
