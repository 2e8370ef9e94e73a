"""One layer's forward and backward pass as one list of equations, to be cut into slices."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.interpret import bodies, opened
from jaxpipe.pipeline.layer.slices import LayerSplit, Saved, Slice
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.schedules import Kind

Tree = Any
Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Tape:
  """One layer's forward and backward pass as one list of equations, and where each thing stands."""

  equations: Sequence[eq.Equation]
  consts: dict[eq.Var, Any]
  given: Sequence[eq.Var]
  x: Sequence[eq.Var]
  dy: Sequence[eq.Var]
  y: Sequence[Any]
  aux: Sequence[Any]
  residuals: Sequence[Any]
  dx: Sequence[Any]
  dparams: Sequence[Any]
  moving: set[eq.Var]  # all that depends on x, on the batch or on dy
  cotangents: set[eq.Var]  # all that depends on dy

  @classmethod
  def trace(
    cls,
    layer: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
    params: Tree,
    inputs: Tree,
    x: Tree,
    policy: Callable[..., bool] | None,
  ) -> Tape:
    counts: list[int] = []

    def both(params: Tree, inputs: Tree, x: Tree, dy: Leaves) -> Any:
      out = _vjp(layer, params, inputs, x, dy, policy)
      counts[:] = [len(jax.tree.leaves(part)) for part in out]
      return out

    everything = jax.tree.leaves((params, inputs, x))
    dy = _stand_ins(jax.eval_shape(eq.lenient(layer), params, inputs, x)[0], everything)
    closed = eq.trace(both, params, inputs, x, dy)
    jaxpr = opened(closed)
    n_given, n_x = len(jax.tree.leaves((params, inputs))), len(jax.tree.leaves(x))
    given, x_in, dy_in = _take(jaxpr.invars, n_given, n_x, len(dy))
    equations = list(jaxpr.eqns)
    _warn_of_effects(equations)
    # A dropout mask is drawn again, for it is made of numbers; what is made of data is kept.
    batch = [given[i] for i in _batch_leaves(params, inputs)]
    y, aux, residuals, dx, dparams = _take(jaxpr.outvars, *counts)
    return cls(
      equations,
      dict(zip(jaxpr.constvars, closed.consts, strict=True)),
      *(given, x_in, dy_in, y, aux, residuals, dx, dparams),
      eq.depends(equations, [*x_in, *batch, *dy_in]),
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

  def cut(
    self,
    made: dict[Kind, list[eq.Var]],
    waiting: Sequence[eq.Var],
    rereads: Collection[Kind] = (),
  ) -> LayerSplit:
    """Makes the slices.

    Args:
      made: what each action leaves for later ones.
      waiting: what W reads.
      rereads: actions that have x at hand.
    """
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
    x = {kind: self.x if kind in rereads else [] for kind in (Kind.R, Kind.I, Kind.B)}
    slices = {
      Kind.R: slice_(x[Kind.R], made[Kind.F], [], Kind.R),
      Kind.I: slice_([*x[Kind.I], *self.dy], at_hand, self.dx, Kind.I),
      Kind.W: slice_([], waiting, self.dparams),
    }
    for kind, one in slices.items():
      last |= {saved[n][0]: kind for n in one.reads}
    return LayerSplit(
      forward=slice_(self.x, [], [*self.y, *self.aux], Kind.F),
      primal=slice_(self.x, [], [*self.y, *self.aux]),
      recompute=slices[Kind.R] if made[Kind.R] else None,
      input_grad=slices[Kind.I],
      weight_grad=slices[Kind.W],
      backward=slice_([*x[Kind.B], *self.dy], at_hand, [*self.dx, *self.dparams]),
      saved=[_saved(v, kind, last[v]) for v, kind in saved],
      y_count=len(self.y),
      aux_count=len(self.aux),
      dx_count=len(self.dx),
    )


def _saved(variable: Any, made: Kind, last: Kind) -> Saved:
  return Saved(variable.aval.shape, variable.aval.dtype, made, last)


def _vjp(
  layer: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
  params: Tree,
  inputs: Tree,
  x: Tree,
  dy: Leaves,
  policy: Callable[..., bool] | None,
) -> tuple[Tree, Tree, Leaves, Leaves, Tree]:
  """Returns y, aux, the residuals, dx and dparams."""

  def run(params: Tree, floats: Leaves, x: Tree, inputs: Tree) -> tuple[Leaves, Tree]:
    y, aux = layer(params, inputs, with_float_leaves(x, floats))
    return float_leaves(y), (y, aux)

  kept = run if policy is None else jax.checkpoint(run, policy=policy)
  _, back, (y, aux) = jax.vjp(
    lambda params, floats: kept(params, floats, x, inputs), params, float_leaves(x), has_aux=True
  )
  dparams, dx = back(dy)
  return y, aux, jax.tree.leaves(back), dx, dparams


def _stand_ins(y: Tree, like: Sequence[Any]) -> Leaves:
  """Cotangents of y's float leaves, as far as their types go; they vary where anything does."""
  axes = axes_of(like)
  zeros: Leaves = vary([jnp.zeros(leaf.shape, leaf.dtype) for leaf in float_leaves(y)], axes)
  return zeros


def _batch_leaves(params: Tree, inputs: Tree) -> list[int]:
  """Places of the batch's own leaves among the leaves of `(params, inputs)`."""
  found = jax.tree.leaves_with_path((params, inputs))
  batch = (jax.tree_util.SequenceKey(1), jax.tree_util.DictKey("batch"))
  return [i for i, (path, _) in enumerate(found) if path[:2] == batch]


def _warn_of_effects(equations: Sequence[eq.Equation]) -> None:
  if names := sorted({*_callbacks(equations)}):
    warnings.warn(
      f"a layer calls {', '.join(names)}, which a pipeline leaves out or repeats: it computes"
      " values only; run jaxpipe.reference_value_and_grad to see what a layer prints",
      stacklevel=2,
    )


def _callbacks(equations: Sequence[eq.Equation]) -> Iterator[str]:
  # A sum over an axis has an effect too, which is to name the axis.
  for equation in equations:
    name = str(equation.primitive.name)
    if equation.effects and ("debug" in name or "callback" in name):
      yield name
    for body in bodies(equation):
      yield from _callbacks(body.eqns)


def _take(items: Sequence[Any], *counts: int) -> list[list[Any]]:
  out, at = [], 0
  for count in counts:
    out.append(list(items[at : at + count]))
    at += count
  assert at == len(items)
  return out
