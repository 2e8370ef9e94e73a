"""In which order a device computes the results of one variable, so that it holds few at a time.

A moment is written over the old one, and several results read it. Values much smaller than the
variable come first, then the results, each when nobody else reads what it replaces; `apart`
has XLA keep to that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.pipeline.update.dataflow import Operation
from jaxpipe.pipeline.update.division import Local


def needed(
  one: Local, refs: Sequence[Any], known: Container[int] = ()
) -> tuple[list[Operation], set[int]]:
  """The operations of a local program that some values need, and all values that these read."""
  used = {ref for ref in refs if isinstance(ref, int)}
  found = []
  for operation in reversed(one.operations):
    if any(v in used and v not in known for v in operation.outs):
      found.append(operation)
      used.update(ref for ref in operation.ins if isinstance(ref, int))
  return found[::-1], used


def small_values(one: Local, avals: Sequence[Any]) -> list[int]:
  """What a local program makes of tensors that is much smaller, such as norms, in order.

  Computed before all results, it keeps little: the tensors that it is made of are computed again
  where they are needed, and in neither place held whole.
  """
  found = []
  for operation in one.operations:
    sizes = [math.prod(avals[ref].shape) for ref in operation.ins if isinstance(ref, int)]
    if len(operation.outs) == 1 and 2 * math.prod(avals[operation.outs[0]].shape) <= max(
      sizes, default=0
    ):
      found.append(operation.outs[0])
  return found


def in_order(one: Local) -> list[list[int]]:
  """The results of a local program in lots, so that none is written before its last reader has run.

  A moment that is written replaces the old one. Results that read each other's old values are of
  one lot; a lot whose old values nobody else reads comes as soon as it can, so that as few results
  as possible are held at a time.
  """
  reads = []
  for role, ref in one.outs:
    used = needed(one, [ref])[1]
    reads.append({other for other, number in one.reads.items() if number in used} - {role})
  left = list(range(len(one.outs)))
  lots = []
  while left:
    free = [i for i in left if not any(one.outs[i][0] in reads[j] for j in left if j != i)]
    lot = free[:1] or left
    # Equal results are computed once.
    lot = [i for i in left if i in lot or (i in free and one.outs[i][1] == one.outs[lot[0]][1])]
    lots.append(lot)
    left = [i for i in left if i not in lot]
  return lots


def apart(ticket: Any, fn: Callable[[], list[jax.Array]]) -> tuple[list[jax.Array], jax.Array]:
  """Runs `fn` so that XLA makes its results before anything else is made or written.

  Otherwise XLA may compute a result where it is written, read the arrays again there, and copy them
  whole, in every round of the loop, because what it reads may have been written by then.

  Args:
    ticket: int32 [], 0 or more, and not known when the program is compiled: at first the number of
      the device.
    fn: returns new arrays.

  Returns:
    What `fn` returns, and the ticket for what is to run after it.
  """
  shapes = jax.eval_shape(fn)
  return lax.cond(
    jnp.asarray(ticket) >= 0,
    lambda: (fn(), jnp.int32(ticket)),
    lambda: ([jnp.zeros(s.shape, s.dtype) for s in shapes], jnp.int32(-1)),
  )
