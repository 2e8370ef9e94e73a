"""How much the inside of an action holds at once, estimated from its equations.

Rings, pools and sums have known sizes; what XLA needs besides, for the inside of one layer or of
the head, has not. Live ranges over the equations in their order come near it, if values that
compilers fuse into what reads them take no room. XLA orders and fuses anew, so this is an estimate
and not a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxpipe.pipeline.device.carry import Carry
from jaxpipe.pipeline.device.device import Device
from jaxpipe.pipeline.layer.interpret import Equation, Var, bodies
from jaxpipe.pipeline.layer.slices import Slice
from jaxpipe.schedules import Kind

# Equations whose operands and results lie in memory; all others are fused into their readers.
_LIES_IN_MEMORY = (
  *("dot_general", "conv_general", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "arg"),
  *("sort", "top_k", "cum", "gather", "scatter", "dynamic_update_slice", "fft", "pallas", "custom"),
  *("scan", "while", "cond"),
)


def workspace(device: Device, carry: Carry) -> int:
  """Estimates the bytes that one device needs beside what it carries from tick to tick.

  They are the table of ticks, what is sent and received at the end of a tick, and the inside of the
  action that needs most.

  Args:
    device: traced.
    carry: what it carries.
  """
  stage, program = device.stage, device.context.program
  # A second forward inside B or I has pools of its own.
  again = stage.rerun_layout.one_each_bytes() if stage.rerun_layout else 0
  of_kind = {
    Kind.F: max(slice_peak(one.forward) for one in stage.splits),
    Kind.R: max(slice_peak(one.recompute) for one in stage.splits),
    Kind.B: max(slice_peak(one.backward) for one in stage.splits) + again,
    Kind.I: max(slice_peak(one.input_grad) for one in stage.splits) + again,
    Kind.W: max(slice_peak(one.weight_grad) for one in stage.splits),
  }
  # The scratch of I and R is alive with the inside of the action, on either side of it.
  for kind, scratch in stage.scratch.items():
    of_kind[kind] += scratch.layout.one_each_bytes()
  head = device.ends.heaviest()
  widest = max(live_peak(head.eqns, head.outvars), *(of_kind.get(k, 0) for k in program.kinds))
  # What is sent and what arrives; with slack, also what is still on its way.
  travelling = 2 * tree_bytes(device.context.x) + tree_bytes(carry.flight)
  columns = [program.table, program.collectives.slots, program.collectives.home]
  table = 4 * program.ticks * (sum(map(len, columns)) + device.cells.shape[-1])
  return table + travelling + widest


def slice_peak(part: Slice | None) -> int:
  """Estimates the most bytes alive at once inside one slice of a layer; 0 where there is none."""
  return live_peak(part.equations, part.outputs) if part else 0


def tree_bytes(tree: Any) -> int:
  """Bytes of all arrays, or stand-ins of arrays, in a tree."""
  return sum(map(_bytes, jax.tree.leaves(tree)))


def live_peak(equations: Sequence[Equation], outputs: Sequence[Any]) -> int:
  """Returns the most bytes alive at once.

  An input counts from its first use to its last: it is a slice of a stack of parameters or saved
  values, made where it is read.

  Args:
    equations: in the order in which they run.
    outputs: variables and literals alive at the end.
  """
  steps = _steps(equations, outputs)
  last = {v: n for n, (touched, _) in enumerate(steps) for v in touched}
  alive: set[Var] = set()
  peak = 0
  for n, (touched, inside) in enumerate(steps):
    # Operands and results of one equation are alive together, whatever is freed after it.
    alive |= touched
    peak = max(peak, inside + sum(_bytes(v.aval) for v in alive))
    alive = {v for v in alive if last[v] > n}
  return peak


def _steps(equations: Sequence[Equation], outputs: Sequence[Any]) -> list[tuple[set[Var], int]]:
  """What lies in memory while each equation runs, and what a loop or branch holds inside."""
  lies = set(_variables(outputs))
  for equation in equations:
    if equation.primitive.name.startswith(_LIES_IN_MEMORY):
      lies.update(_variables(equation.invars), equation.outvars)
  # What a value that is fused away is computed from.
  sources: dict[Var, set[Var]] = {}

  def sources_of(items: Sequence[Any]) -> set[Var]:
    return set().union(*(sources.get(v, {v}) for v in _variables(items)))

  steps = []
  for equation in equations:
    reads = sources_of(equation.invars)
    made = lies.intersection(equation.outvars)
    # A value that is fused away keeps its sources alive until its reader runs.
    sources.update((v, {v} if v in made else reads) for v in equation.outvars)
    if made:
      inside = max((live_peak(body.eqns, body.outvars) for body in bodies(equation)), default=0)
      steps.append((reads | made, inside))
  return [*steps, (sources_of(outputs), 0)]


def _variables(items: Sequence[Any]) -> list[Var]:
  return [v for v in items if isinstance(v, Var)]


def _bytes(array: Any) -> int:
  return math.prod(array.shape) * array.dtype.itemsize
