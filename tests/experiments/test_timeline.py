"""The script from its flags to its files, on a model of no size."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run(*flags):
  command = [sys.executable, ROOT / "experiments/timeline.py", *flags]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_it_prints_both_and_writes_picture_and_trace(tmp_path):
  small = ("--layers=4", "--width=16", "--sequence_length=8", "--batch_size=4", "--steps=1")
  done = run(*small, "--schedule=zb-v", "--microbatches=4", f"--out={tmp_path}")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  stages = {line.split()[0]: line.split()[1:] for line in lines if line[2:3] in "FIW"}
  assert {kind: len(row) for kind, row in stages.items()} == {"F": 4, "I": 4, "W": 4}
  assert any(line.startswith("step, clock not read") for line in lines)
  assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
  events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
  # Two processes, 4 stages, 4 microbatches, F and I and W.
  assert sum(event["ph"] == "X" for event in events) == 2 * 4 * 4 * 3


def test_what_it_cannot_run_is_one_line():
  done = run("--layers=3", "--stages=2")
  assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("timeline.py: 3 layers")
