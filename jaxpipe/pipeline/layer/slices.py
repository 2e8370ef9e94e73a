"""A layer in slices: the functions that `split` makes of one layer and that a stage runs.

A *slice* is a list of equations with its inputs and outputs. The slices of a layer run at different
times: F of a microbatch now, I of it many ticks later. What one of them leaves for another is a
*saved value*. It has a number that all slices of the layer know it by, and lies between the actions
in a pool (`storage/pools.py`) or an arena (`storage/arenas.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.interpret import Equation, Var, opened
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]


# Without `eq` it is hashed by identity, lists and all: `jax.jit` hashes the functions it is given.
@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
  """Equations from some variables to others, callable as a function of arrays.

  Attributes:
    inputs: variables whose values it is called with, in this order.
    equations: those that compute the outputs, in the order in which they run.
    outputs: variables and literals whose values it returns, in this order.
    consts: values of the variables that are constants of the traced layer.
    reads: numbers of the saved values among the inputs, in the inputs' order.
    makes: numbers of the saved values that it leaves, which are the last of its outputs.
  """

  inputs: Sequence[Var]
  equations: Sequence[Equation]
  outputs: Sequence[Any]
  consts: dict[Var, Any]
  reads: tuple[int, ...]
  makes: tuple[int, ...]

  @classmethod
  def of(cls, closed: Any) -> Slice:
    """All equations of a closed jaxpr, which saves nothing."""
    jaxpr = opened(closed)
    consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    return cls(jaxpr.invars, jaxpr.eqns, jaxpr.outvars, consts, (), ())

  def reads_given(self, given: Sequence[Any]) -> list[bool]:
    """Says which of the layer's parameters and further inputs the slice reads.

    Args:
      given: their leaves, or the first few of them; only their number counts.

    Returns:
      One bool for each of `given`.
    """
    read = {*eq.used(self.equations, self.outputs)}
    return [v in read for v, _ in zip(self.inputs, given, strict=False)]

  def __call__(self, *leaves: jax.Array) -> Leaves:
    values = self.consts | dict(zip(self.inputs, leaves, strict=True))
    return eq.evaluate(self.equations, values, self.outputs)


@dataclasses.dataclass(frozen=True)
class Saved:
  """A value that one action leaves for a later one, once for each microbatch.

  Attributes:
    shape: shape of the array, for one layer and one microbatch.
    dtype: dtype of the array.
    made: the action that leaves it: F, R or I.
    last: the last action that reads it, after which its memory is free: R, I or W. In a schedule
      whose B does the work of I and W, I and W both mean that B.
  """

  shape: tuple[int, ...]
  dtype: Any
  made: Kind
  last: Kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSplit:
  """One layer as slices, one for each action.

  In the signatures below, `given` stands for the leaves of the layer's parameters and of its
  further inputs, which are at hand whenever an action runs. What depends on nothing else (a
  transposed weight, a dropout mask) is computed again by every slice that needs it and is never
  saved. `saved` stands for the values that the slice `reads` or `makes`. `[x]` stands for the
  leaves of x in the slices that run the forward again from the layer's input, else for nothing.

  Attributes:
    forward: F, `given, x -> y, aux, saved`.
    primal: `given, x -> y, aux`: the forward alone, where nothing is to be saved.
    recompute: R, `given, saved, [x] -> saved`; None where nothing is left to R.
    input_grad: I, `given, saved, [x], dy -> dx, saved`. `dy` and `dx` are the cotangents of the
      float leaves of y and x.
    weight_grad: W, `given, saved -> dparams`, the gradients of the parameters' leaves.
    backward: B, I and W in one: `given, saved, [x], dy -> dx, dparams`. It leaves nothing.
    saved: all saved values; the index is a value's number.
    y_count: number of leaves of y.
    aux_count: number of leaves of the layer's further output, which has no gradient.
    dx_count: number of float leaves of x.
  """

  forward: Slice
  primal: Slice
  recompute: Slice | None
  input_grad: Slice
  weight_grad: Slice
  backward: Slice
  saved: Sequence[Saved]
  y_count: int
  aux_count: int
  dx_count: int
