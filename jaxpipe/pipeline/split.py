"""Cuts any layer's vector-Jacobian product into forward, input gradient and weight gradient.

Zero-bubble schedules (Qi et al., arXiv 2401.10241) want the two halves of a backward pass apart:
`I` is on the critical path, `W` can wait. Nobody has to write them. `jax.vjp` of the layer is
traced once and its equations are sliced:

      params, inputs ──┬───────────────┬──────────────────┬─────────────┐
                       ▼               ▼                  ▼             │
      x ────────────▶ [1] F ──kept──▶ [2] I ──waiting──▶ [3] W ──▶ dparams
                       │               ▲ │
                       ▼            dy─┘ └─▶ dx
                       y
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline import equations as eq

Tree = Any
Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
  """Equations from some variables to others, as a function of leaves."""

  inputs: Sequence[eq.Var]
  equations: Sequence[eq.Equation]
  outputs: Sequence[Any]
  consts: dict[eq.Var, Any]

  def __call__(self, *leaves: jax.Array) -> Leaves:
    values = self.consts | dict(zip(self.inputs, leaves, strict=True))
    return eq.evaluate(self.equations, values, self.outputs)


@dataclasses.dataclass(frozen=True)
class LayerSplit:
  """One layer as three functions of leaves; `backward` is the second and third in one.

  `given` below stands for the leaves of the layer's parameters and of its further inputs, which are
  at hand whenever an action runs. What depends on nothing else is computed again where it is
  needed: it is never stored once per microbatch.

  Attributes:
    forward: `given, x -> y, kept`.
    primal: `given, x -> y`, nothing kept.
    input_grad: `given, kept, dy -> dx, waiting`. Cotangents are those of x's float leaves.
    weight_grad: `given, waiting -> dparams`.
    backward: `given, kept, dy -> dx, dparams`.
    kept: shapes and dtypes of what F keeps for the backward pass.
    waiting: of what I leaves for W.
    x_count: number of leaves of x (and of y).
    dx_count: number of float leaves of x.
  """

  forward: Slice
  primal: Slice
  input_grad: Slice
  weight_grad: Slice
  backward: Slice
  kept: Sequence[jax.ShapeDtypeStruct]
  waiting: Sequence[jax.ShapeDtypeStruct]
  x_count: int
  dx_count: int


def is_float(leaf: Any) -> bool:
  """Whether a leaf has a gradient."""
  return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def float_leaves(tree: Tree) -> list[Any]:
  """The leaves that have a gradient, in order."""
  return [leaf for leaf in jax.tree.leaves(tree) if is_float(leaf)]


def with_float_leaves(tree: Tree, floats: Sequence[jax.Array]) -> Tree:
  """`tree` with its float leaves replaced."""
  leaves, structure = jax.tree.flatten(tree)
  new = iter(floats)
  return jax.tree.unflatten(structure, [next(new) if is_float(leaf) else leaf for leaf in leaves])


def split(
  layer: Callable[[Tree, Tree, Tree], Tree],
  params: Tree,
  inputs: Tree,
  x: Tree,
  policy: Callable[..., bool] | None = None,
) -> LayerSplit:
  """Traces a layer's forward and backward pass and cuts it.

  Args:
    layer: `(params, inputs, x) -> y`, y with the structure, shapes and dtypes of x.
    params: tree of float arrays, or stand-ins of the same shapes, dtypes and mesh axes.
    inputs: tree of whatever else the layer reads; never differentiated.
    x: its input; integer and boolean leaves pass through without a gradient.
    policy: a `jax.checkpoint` policy saying what F keeps; None keeps what `jax.vjp` does.

  Returns:
    The five slices.
  """
  counts = _Counts()

  def both(params: Tree, inputs: Tree, x: Tree, dy: Leaves) -> Any:
    y, residuals, dx, dparams = _vjp(layer, params, inputs, x, dy, policy)
    counts.y, counts.residuals, counts.dx = len(jax.tree.leaves(y)), len(residuals), len(dx)
    return y, residuals, dx, dparams

  dy = float_leaves(x)  # as stand-ins: y is like x
  closed = eq.trace(both, params, inputs, x, dy)
  jaxpr = getattr(closed, "jaxpr", closed)
  n_given, n_x = len(jax.tree.leaves((params, inputs))), len(jax.tree.leaves(x))
  given, x_in, dy_in = _take(jaxpr.invars, n_given, n_x, len(dy))
  y_out, residuals, dx_out, dp_out = _take(
    jaxpr.outvars, counts.y, counts.residuals, counts.dx, len(jax.tree.leaves(params))
  )
  tape = list(jaxpr.eqns)
  consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  fixed = {*given, *consts}
  moving = eq.depends(tape, [*x_in, *dy_in])  # all that differs between microbatches

  def cut(inputs: Sequence[eq.Var], outputs: Sequence[Any]) -> Slice:
    return Slice(inputs, eq.needed(outputs, tape, {*inputs, *consts}), outputs, consts)

  # [1] Equal residuals are kept once; those that do not depend on x are computed again.
  kept = [v for v in eq.used([], residuals) if v in moving]
  # [2] I is all that dx needs, and all that is recomputed, for dx or for dparams: left to W, the
  # attention's output would be recomputed there from its scores, and the scores would have to wait.
  start = {*fixed, *kept, *dy_in}
  cotangents = eq.depends(tape, dy_in)
  both_need = {v for e in eq.needed(dp_out, tape, start) for v in e.outvars} & moving - cotangents
  in_i = eq.needed([*dx_out, *both_need], tape, start)
  # [3] W is the rest: what of dparams I has not computed yet.
  at_hand = {*kept, *dy_in, *(v for e in in_i for v in e.outvars)} & moving
  in_w = eq.needed(dp_out, tape, fixed | at_hand)
  waiting = [v for v in eq.used(in_w, dp_out) if v in at_hand]
  return LayerSplit(
    forward=cut([*given, *x_in], [*y_out, *kept]),
    primal=cut([*given, *x_in], y_out),
    input_grad=cut([*given, *kept, *dy_in], [*dx_out, *waiting]),
    weight_grad=cut([*given, *waiting], dp_out),
    backward=cut([*given, *kept, *dy_in], [*dx_out, *dp_out]),
    kept=_shapes(kept),
    waiting=_shapes(waiting),
    x_count=n_x,
    dx_count=counts.dx,
  )


@dataclasses.dataclass
class _Counts:
  y: int = 0
  residuals: int = 0
  dx: int = 0


def _vjp(
  layer: Callable[[Tree, Tree, Tree], Tree],
  params: Tree,
  inputs: Tree,
  x: Tree,
  dy: Leaves,
  policy: Callable[..., bool] | None,
) -> tuple[Tree, Leaves, Leaves, Tree]:
  def run(params: Tree, floats: Leaves, x: Tree, inputs: Tree) -> tuple[Leaves, Tree]:
    y = layer(params, inputs, with_float_leaves(x, floats))
    return float_leaves(y), y

  kept = run if policy is None else jax.checkpoint(run, policy=policy)
  _, back, y = jax.vjp(
    lambda params, floats: kept(params, floats, x, inputs), params, float_leaves(x), has_aux=True
  )
  dparams, dx = back(dy)
  return y, jax.tree.leaves(back), dx, dparams


def _take(items: Sequence[Any], *counts: int) -> list[list[Any]]:
  out, at = [], 0
  for count in counts:
    out.append(list(items[at : at + count]))
    at += count
  assert at == len(items)
  return out


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
  return [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in variables]
