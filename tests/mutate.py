"""Breaks the package in twenty-two ways, one at a time, and sees that tests notice each.

    .venv/bin/python tests/mutate.py [NAME ...]          # all faults, or those of these names

Takes twenty minutes. Works on a copy; exits with 1 if a fault goes unnoticed or no longer applies.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parent.parent
# Tests of values first: what they miss, tests of tables may still find.
SUITES = ("tests/pipeline/test_exactness.py", "tests/pipeline/table/test_program.py")
ON_MESHES = ("tests/parallel/test_meshes.py",)
REPEATED = ("tests/pipeline/test_repeated_layers.py",)
BY_KIND = ("tests/schedules/by_kind/test_by_kind.py", "tests/pipeline/test_ticks_by_kind.py")
OF_STAGES = (
  "tests/pipeline/device/test_switched_stages.py",
  "tests/pipeline/costs/test_packing.py",
)


@dataclasses.dataclass(frozen=True)
class Fault:
  """One line of the package, and what stands in its place.

  Attributes:
    name: what goes wrong.
    file: below `jaxpipe/`.
    line: a text that occurs once.
    broken: what replaces it.
    suites: the tests that are to notice, in this order.
  """

  name: str
  file: str
  line: str
  broken: str
  suites: tuple[str, ...] = SUITES


FAULTS = [
  Fault(
    "wrong slot",
    "pipeline/table/transfers.py",
    "= slots.number[one.ring, one.target, value]",
    "= (slots.number[one.ring, one.target, value] + 1) % slots.count[one.ring]",
  ),
  Fault(
    "wrong microbatch key",
    "pipeline/device/device.py",
    "layer=first + i, microbatch=now.microbatch",
    "layer=first + i, microbatch=now.microbatch + 1",
  ),
  Fault(
    "missing replica sum",
    "parallel/replicas.py",
    "own = own.at[jnp.asarray(one.source)[here]].add(sent)",
    "own = own.at[jnp.asarray(one.source)[here]].add(0 * sent)",
  ),
  Fault(
    "dropped W",
    "pipeline/device/device.py",
    "grads = now.when([Kind.W], run, lambda same: same,",
    "grads = now.when([Kind.W], lambda same: same, lambda same: same,",
  ),
  Fault(
    "stale buffer",
    "pipeline/device/device.py",
    "gradients = rings.store(gradients, float_leaves(arrived), slot)",
    "gradients = rings.store(carry.gradients, float_leaves(arrived), slot)",
  ),
  Fault(
    "swapped chunk",
    "pipeline/table/lower.py",
    'schedule.placement.chunk(d, s)\n    table["first"]',
    'schedule.chunks - 1 - schedule.placement.chunk(d, s)\n    table["first"]',
  ),
  Fault(
    "loss weight ignored",
    "pipeline/executor.py",
    "/ divisor(weight, grad.dtype)",
    "/ jnp.ones_like(weight).astype(grad.dtype)",
  ),
  Fault(
    "off-by-one route",
    "pipeline/table/transfers.py",
    ".add((one.source, one.target))",
    ".add((one.source, (one.target + 1) % P))",
  ),
  Fault(
    "mask of other positions",
    "models/transformer/decoder.py",
    "context.dropout(y_BTD, rate, positions=outside_T)",
    "context.dropout(y_BTD, rate, positions=at_T[: len(outside_T)])",
    ON_MESHES,
  ),
  Fault(
    "shards summed",
    "pipeline/executor.py",
    "cut = {axis for entry in spec for axis in axes_of_entry(entry)}",
    "cut = {STAGE} & {axis for entry in spec for axis in axes_of_entry(entry)}",
    ON_MESHES,
  ),
  Fault(
    "gathered too early",
    "pipeline/device/device.py",
    "rings.put(ring, self.weights.gathered(now.chunk * self.stage.layers), now.weights)",
    "rings.put(ring, self.weights.gathered(0 * now.chunk), now.weights)",
    ON_MESHES,
  ),
  Fault(
    "sum left out",
    "parallel/tensor.py",
    "else axes.total(x_BTD, TENSOR)",
    "else x_BTD",
    ON_MESHES,
  ),
  Fault(
    "records that share rows",
    "pipeline/storage/arenas.py",
    "table[tick, d, r] = base[d, name] + slot[at] * rows",
    "table[tick, d, r] = base[d, name]",
    OF_STAGES,
  ),
  Fault(
    "borrowed gradient lost",
    "stack/shared_leaves.py",
    "rows[name] = write_span(rows[name], old + whole, place.offset, chunk)",
    "rows[name] = write_span(rows[name], old + 0 * whole, place.offset, chunk)",
    OF_STAGES,
  ),
  Fault(
    "statistics of a shard",
    "stack/module_spec.py",
    "over = tuple(axis for axis in (*ROWS, SEQUENCE) if axes.size(axis) > 1)",
    "over = ()",
    OF_STAGES,
  ),
  Fault(
    "statistics of the last microbatch",
    "pipeline/device/switched_stages.py",
    "new = old + new if is_float(leaf) else jnp.maximum(old, new)",
    "new = new * self.context.program.schedule.microbatches",
    OF_STAGES,
  ),
  Fault(
    "key of a stage",
    "stack/network.py",
    'LayerInputs = {**inputs, "layer": layer_number(name)}',
    'LayerInputs = {**inputs, "layer": 0}',
    OF_STAGES,
  ),
  Fault(
    "gradient of the loss",
    "pipeline/device/boundaries.py",
    "jnp.ones((), loss.dtype)",
    "2 * jnp.ones((), loss.dtype)",
    OF_STAGES,
  ),
  Fault(
    "loss not counted",
    "pipeline/device/inner_ends.py",
    "return count(totals, *self.result.unpack(packed))",
    "return totals",
    OF_STAGES,
  ),
  Fault(
    "row of another layer",
    "pipeline/device/weights.py",
    "jnp.asarray(of, jnp.int32)[layer]",
    "jnp.asarray(of, jnp.int32)[0 * layer]",
    REPEATED,
  ),
  Fault(
    "wrong tick",
    "schedules/ticks.py",
    "*(sent + 1 + slack for sent, *_ in crossing)",
    "*(sent + 1 for sent, *_ in crossing)",
    BY_KIND,
  ),
  Fault(
    "wrong guest",
    "schedules/by_kind/cycles.py",
    "cycle <= last_f",
    "cycle <= last_f + 1",
    BY_KIND,
  ),
]


def broken(text: str, fault: Fault) -> str:
  """The file's text with the fault.

  Raises:
    ValueError: the line is not there once.
  """
  if text.count(fault.line) != 1:
    raise ValueError(f"{fault.file} has {text.count(fault.line)} times: {fault.line}")
  return text.replace(fault.line, fault.broken)


def first_failure(copy: pathlib.Path, suites: Sequence[str]) -> str | None:
  """Name of the first test that fails in a copy of the repository; None if all pass."""
  for suite in suites:
    command = [
      sys.executable,
      "-m",
      "pytest",
      suite,
      "-x",
      "-q",
      "-n",
      "0",
      "-p",
      "no:cacheprovider",
      "--grid-seed=0",
    ]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    done = subprocess.run(
      command, cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if failed:
      return failed[1]
    if done.returncode:
      raise RuntimeError(done.stdout + done.stderr)
  return None


def main() -> int:
  """Prints who notices each fault; the sound copy must pass."""
  noticed = True
  asked = [fault for fault in FAULTS if fault.name in sys.argv[1:]]
  for fault in asked or [None, *FAULTS]:
    with tempfile.TemporaryDirectory() as folder:
      copy = pathlib.Path(folder)
      for part in ("jaxpipe", "tests"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
      shutil.copy(ROOT / "pyproject.toml", copy)
      if fault:
        file = copy / "jaxpipe" / fault.file
        file.write_text(broken(file.read_text(), fault))
      found = first_failure(copy, fault.suites if fault else (*SUITES, *ON_MESHES))
    noticed &= (found is None) == (fault is None)
    print(f"{fault.name if fault else 'no fault':22} {found or 'all tests pass'}", flush=True)
  return 0 if noticed else 1


if __name__ == "__main__":
  sys.exit(main())
