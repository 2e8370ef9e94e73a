"""Cuts any layer's vector-Jacobian product into forward, recompute, input and weight gradient.

Zero-bubble schedules (Qi et al., arXiv 2401.10241) want the two halves of a backward pass apart:
`I` is on the critical path, `W` can wait. Nobody has to write them. `jax.vjp` of the layer is
traced once and its equations are sliced; what one slice leaves for a later one is a *saved value*:

      params, inputs ──┬─────────────┬──────────────┬──────────────────┐
                       ▼             ▼              ▼                  ▼
      x ────────────▶ [1] F ──────▶ [2] R ───────▶ [3] I ──────────▶ [4] W ──▶ dparams
                       │   saved        remade      │ ▲     waiting
                       ▼                         dx◀┘ └─dy
                       y
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline import equations as eq
from jaxpipe.schedules import Kind

Tree = Any
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
  or `makes`.

  Attributes:
    forward: `given, x -> y, saved`.
    primal: `given, x -> y`, nothing saved.
    recompute: `given, saved -> saved`; without an R of its own, None.
    input_grad: `given, saved, dy -> dx, saved`. Cotangents are those of x's float leaves.
    weight_grad: `given, saved -> dparams`.
    backward: `given, saved, dy -> dx, dparams`.
    saved: all saved values, in the order of their numbers.
    x_count: number of leaves of x (and of y).
    dx_count: number of float leaves of x.
  """

  forward: Slice
  primal: Slice
  recompute: Slice | None
  input_grad: Slice
  weight_grad: Slice
  backward: Slice
  saved: Sequence[Saved]
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
  *,
  recompute: bool = False,
) -> LayerSplit:
  """Traces a layer's forward and backward pass and cuts it.

  Args:
    layer: `(params, inputs, x) -> y`, y with the structure, shapes and dtypes of x.
    params: tree of float arrays, or stand-ins of the same shapes, dtypes and mesh axes.
    inputs: tree of whatever else the layer reads; never differentiated.
    x: its input; integer and boolean leaves pass through without a gradient.
    policy: a `jax.checkpoint` policy saying what F keeps; None keeps what `jax.vjp` does.
    recompute: whether an R of its own computes again what F did not keep; else I and B do.

  Returns:
    The slices.
  """
  tape = _Tape.trace(layer, params, inputs, x, policy)
  # [1] Equal residuals are kept once; those that do not depend on x are computed again.
  kept = tape.read_by_backward([v for v in eq.used([], tape.residuals) if v in tape.moving])
  at_hand = [*kept, *tape.dy]
  # [2] What of the backward depends on neither the cotangent nor parameters alone.
  again = tape.made_again(at_hand)
  remade = [v for v in eq.used(tape.backward_of_cotangents()) if v in again] if recompute else []
  # [3] I is all that dx needs, and all that is recomputed, for dx or for dparams: left to W, the
  # attention's output would be recomputed there from its scores, and the scores would have to wait.
  in_i = tape.needed([*tape.dx, *again], [*at_hand, *remade])
  # [4] W is the rest: what of dparams I has not computed yet.
  done = {*at_hand, *remade, *(v for e in in_i for v in e.outvars)} & tape.moving
  in_w = tape.needed(tape.dparams, done)
  waiting = [v for v in eq.used(in_w, tape.dparams) if v in done]
  made = {Kind.F: kept, Kind.R: remade}
  made[Kind.I] = [v for v in waiting if v not in {*kept, *remade}]
  return tape.cut(made, waiting)


@dataclasses.dataclass(frozen=True)
class _Tape:
  """One layer's forward and backward pass as one list of equations, and where each thing stands."""

  equations: Sequence[eq.Equation]
  consts: dict[eq.Var, Any]
  given: Sequence[eq.Var]
  x: Sequence[eq.Var]
  dy: Sequence[eq.Var]
  y: Sequence[Any]
  residuals: Sequence[Any]
  dx: Sequence[Any]
  dparams: Sequence[Any]
  moving: set[eq.Var]  # all that differs between microbatches
  cotangents: set[eq.Var]  # all that depends on dy

  @classmethod
  def trace(
    cls,
    layer: Callable[[Tree, Tree, Tree], Tree],
    params: Tree,
    inputs: Tree,
    x: Tree,
    policy: Callable[..., bool] | None,
  ) -> _Tape:
    counts: list[int] = []

    def both(params: Tree, inputs: Tree, x: Tree, dy: Leaves) -> Any:
      out = _vjp(layer, params, inputs, x, dy, policy)
      counts[:] = [len(jax.tree.leaves(part)) for part in out]
      return out

    dy = float_leaves(x)  # as stand-ins: y is like x
    closed = eq.trace(both, params, inputs, x, dy)
    jaxpr = getattr(closed, "jaxpr", closed)
    n_given, n_x = len(jax.tree.leaves((params, inputs))), len(jax.tree.leaves(x))
    given, x_in, dy_in = _take(jaxpr.invars, n_given, n_x, len(dy))
    equations = list(jaxpr.eqns)
    y, residuals, dx, dparams = _take(jaxpr.outvars, *counts)
    return cls(
      equations,
      dict(zip(jaxpr.constvars, closed.consts, strict=True)),
      *(given, x_in, dy_in, y, residuals, dx, dparams),
      eq.depends(equations, [*x_in, *dy_in]),
      eq.depends(equations, dy_in),
    )

  def needed(self, outputs: Iterable[Any], at_hand: Iterable[eq.Var]) -> list[eq.Equation]:
    """Equations that compute `outputs` from what is at hand, parameters and further inputs."""
    return eq.needed(outputs, self.equations, {*self.given, *self.consts, *at_hand})

  def read_by_backward(self, kept: Sequence[eq.Var]) -> list[eq.Var]:
    """Those of `kept` that the backward pass reads, given that all of them are at hand."""
    wanted = [*self.dx, *self.dparams]
    read = {*eq.used(self.needed(wanted, [*kept, *self.dy]), wanted)}
    return [v for v in kept if v in read]

  def made_again(self, at_hand: Iterable[eq.Var]) -> set[eq.Var]:
    """What the backward pass computes again, for dx or for dparams, from what F kept."""
    backward = self.needed([*self.dx, *self.dparams], at_hand)
    return {v for e in backward for v in e.outvars} & self.moving - self.cotangents

  def backward_of_cotangents(self) -> list[eq.Equation]:
    """The equations of the backward pass that read or make a cotangent."""
    return [
      e
      for e in self.needed([*self.dx, *self.dparams], self.dy)
      if any(v in self.cotangents for v in [*eq.used([e]), *e.outvars])
    ]

  def cut(self, made: dict[Kind, list[eq.Var]], waiting: Sequence[eq.Var]) -> LayerSplit:
    """Makes the slices, given what each action leaves for later ones and what W reads."""
    saved = [(v, kind) for kind, variables in made.items() for v in variables]
    number = {v: n for n, (v, _) in enumerate(saved)}
    last: dict[eq.Var, Kind] = {}

    def slice_(
      inputs: Sequence[eq.Var], known: Iterable[eq.Var], outputs: Sequence[Any], *makes: Kind
    ) -> Slice:
      left = [v for kind in makes for v in made[kind]]
      wanted = [*outputs, *left]
      equations = self.needed(wanted, [*inputs, *known])
      reads = [v for v in eq.used(equations, wanted) if v in number and v in {*known}]
      return Slice(
        [*self.given, *reads, *inputs],
        equations,
        wanted,
        self.consts,
        tuple(number[v] for v in reads),
        tuple(number[v] for v in left),
      )

    at_hand = [*made[Kind.F], *made[Kind.R]]
    slices = {
      Kind.R: slice_([], made[Kind.F], [], Kind.R),
      Kind.I: slice_(self.dy, at_hand, self.dx, Kind.I),
      Kind.W: slice_([], waiting, self.dparams),
    }
    for kind, one in slices.items():
      last |= {saved[n][0]: kind for n in one.reads}
    return LayerSplit(
      forward=slice_(self.x, [], self.y, Kind.F),
      primal=slice_(self.x, [], self.y),
      recompute=slices[Kind.R] if made[Kind.R] else None,
      input_grad=slices[Kind.I],
      weight_grad=slices[Kind.W],
      backward=slice_(self.dy, at_hand, [*self.dx, *self.dparams]),
      saved=[_saved(v, kind, last[v]) for v, kind in saved],
      x_count=len(self.x),
      dx_count=len(self.dx),
    )


def _saved(variable: Any, made: Kind, last: Kind) -> Saved:
  return Saved(variable.aval.shape, variable.aval.dtype, made, last)


def _vjp(
  layer: Callable[[Tree, Tree, Tree], Tree],
  params: Tree,
  inputs: Tree,
  x: Tree,
  dy: Leaves,
  policy: Callable[..., bool] | None,
) -> tuple[Tree, Leaves, Leaves, Tree]:
  """Returns y, the residuals, dx and dparams."""

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
