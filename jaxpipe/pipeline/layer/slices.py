"""A layer in slices: what `split` makes and a stage runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.schedules import Kind

Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
  """Equations from some variables to others, as a function of leaves.

  Attributes:
    inputs, equations, outputs, consts: the function, called with the leaves of `inputs`.
    reads: numbers of the saved values that stand among the inputs.
    makes: numbers of those that stand at the end of the outputs.
  """

  inputs: Sequence[eq.Var]
  equations: Sequence[eq.Equation]
  outputs: Sequence[Any]
  consts: dict[eq.Var, Any]
  reads: tuple[int, ...]
  makes: tuple[int, ...]

  def reads_given(self, given: Sequence[Any]) -> list[bool]:
    """For each of the first inputs, as many as are given, whether the slice reads it."""
    read = {*eq.used(self.equations, self.outputs)}
    return [v in read for v, _ in zip(self.inputs, given, strict=False)]

  def __call__(self, *leaves: jax.Array) -> Leaves:
    values = self.consts | dict(zip(self.inputs, leaves, strict=True))
    return eq.evaluate(self.equations, values, self.outputs)


@dataclasses.dataclass(frozen=True)
class Saved:
  """A value that one action leaves for a later one, once per microbatch.

  Attributes:
    shape, dtype: of the array.
    made: the action that leaves it: F, R or I.
    last: the last that reads it: R, I or W. Where one B does the work of I and W, it is that B.
  """

  shape: tuple[int, ...]
  dtype: Any
  made: Kind
  last: Kind


@dataclasses.dataclass(frozen=True)
class LayerSplit:
  """One layer as functions of leaves; `backward` is I and W in one.

  `given` below stands for the leaves of the layer's parameters and of its further inputs, which are
  at hand whenever an action runs. What depends on nothing else is computed again where it is
  needed: it is never saved once per microbatch. `saved` stands for the values that a slice `reads`
  or `makes`, and `[x]` for x where the layer was cut to be made again from it.

  Attributes:
    forward: `given, x -> y, aux, saved`.
    primal: `given, x -> y, aux`, nothing saved.
    recompute: `given, saved, [x] -> saved`; without an R of its own, None.
    input_grad: `given, saved, [x], dy -> dx, saved`. Cotangents are those of float leaves.
    weight_grad: `given, saved -> dparams`.
    backward: `given, saved, [x], dy -> dx, dparams`.
    saved: all saved values, in the order of their numbers.
    y_count: number of leaves of y.
    aux_count: number of further outputs, which have no gradient.
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
