"""One layer's forward and backward pass as one list of equations, from which slices are taken.

Forward and `jax.vjp` are traced together, so that the variables at which the forward ends and the
backward begins (the residuals) are variables of one list, and "what needs what" can be asked across
both passes. A recorded computation of this kind is called a tape in automatic differentiation.

    inputs   given (params, inputs)   x               dy
                 │                    │               │
                 ▼                    ▼               ▼
             ┌─ forward ───────────────────┬─ backward ────────────────┐
             │ equations, in their order   residuals                   │
             └──┬───────┬──────────────────┴──────┬─────────┬──────────┘
                ▼       ▼                         ▼         ▼
    outputs     y      aux                        dx      dparams
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.interpret import Equation, Var, bodies, opened
from jaxpipe.pipeline.layer.slices import LayerSplit, Saved, Slice
from jaxpipe.pipeline.layer.trace import lenient, trace
from jaxpipe.pipeline.layer.varying import axes_of, vary
from jaxpipe.schedules import Kind

Tree = Any
Leaves = list[jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tape:
  """The equations of a layer's forward and backward pass, and the variables that matter in them.

  Attributes:
    equations: all of them, in the order in which they run; calls are expanded.
    consts: values of the variables that are constants of the trace.
    given: input variables: the leaves of the parameters, then of the layer's further inputs.
    x: input variables: the leaves of the layer's input.
    dy: input variables: the cotangents of y's float leaves.
    y: output variables or literals: the leaves of the layer's output.
    aux: output variables or literals: the leaves of its further output, which has no gradient.
    residuals: output variables or literals: the leaves of the function that `jax.vjp` returned,
      which are all that it keeps of the forward. Equal ones may be there more than once.
    dx: output variables or literals: the cotangents of x's float leaves.
    dparams: output variables or literals: the gradients of the parameters' leaves.
    per_microbatch: variables whose values differ between microbatches, because they depend on x, on
      the batch or on dy. All others can be computed again from `given` at any time.
    cotangents: variables that depend on dy.
  """

  equations: Sequence[Equation]
  consts: dict[Var, Any]
  given: Sequence[Var]
  x: Sequence[Var]
  dy: Sequence[Var]
  y: Sequence[Any]
  aux: Sequence[Any]
  residuals: Sequence[Any]
  dx: Sequence[Any]
  dparams: Sequence[Any]
  per_microbatch: set[Var]
  cotangents: set[Var]

  @classmethod
  def trace(
    cls,
    layer: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
    params: Tree,
    inputs: Tree,
    x: Tree,
    policy: Callable[..., bool] | None,
  ) -> Tape:
    """Traces a layer and its vector-Jacobian product; the arguments are those of `split`."""
    counts: list[int] = []

    def both(params: Tree, inputs: Tree, x: Tree, dy: Leaves) -> Any:
      out = _vjp(layer, params, inputs, x, dy, policy)
      # Overwritten, not appended to: a function may be traced twice.
      counts[:] = [len(jax.tree.leaves(part)) for part in out]
      return out

    # The cotangents are inputs of the trace, so y's types have to be known before it.
    everything = jax.tree.leaves((params, inputs, x))
    dy_leaves = _stand_ins(jax.eval_shape(lenient(layer), params, inputs, x)[0], everything)
    closed = trace(both, params, inputs, x, dy_leaves)
    jaxpr = opened(closed)
    n_given, n_x = len(jax.tree.leaves((params, inputs))), len(jax.tree.leaves(x))
    given, x_in, dy = _take(jaxpr.invars, n_given, n_x, len(dy_leaves))
    equations = list(jaxpr.eqns)
    _warn_of_effects(equations)
    # Of the further inputs, only the batch counts as data of the microbatch. A dropout mask, made
    # of a key and numbers, is drawn again in the backward and never kept.
    batch = [given[i] for i in _batch_leaves(params, inputs)]
    y, aux, residuals, dx, dparams = _take(jaxpr.outvars, *counts)
    return cls(
      equations=equations,
      consts=dict(zip(jaxpr.constvars, closed.consts, strict=True)),
      given=given,
      x=x_in,
      dy=dy,
      y=y,
      aux=aux,
      residuals=residuals,
      dx=dx,
      dparams=dparams,
      per_microbatch=eq.depends(equations, [*x_in, *batch, *dy]),
      cotangents=eq.depends(equations, dy),
    )

  def needed(self, outputs: Iterable[Any], at_hand: Iterable[Var]) -> list[Equation]:
    """Returns the equations that compute `outputs` from `at_hand`, `given` and constants."""
    return eq.needed(outputs, self.equations, {*self.given, *self.consts, *at_hand})

  def read_by_backward(self, kept: Sequence[Var]) -> list[Var]:
    """Returns those of `kept` that the backward pass reads, given that all of them are at hand."""
    # What a policy lets F keep need not be read: with a later value at hand, the backward may have
    # no use for the one that it was computed from.
    wanted = [*self.dx, *self.dparams]
    read = {*eq.used(self.needed(wanted, [*kept, *self.dy]), wanted)}
    return [v for v in kept if v in read]

  def recomputed(self, at_hand: Iterable[Var]) -> set[Var]:
    """Returns the variables of the forward that the backward pass computes again from `at_hand`."""
    # Without cotangents an equation belongs to the forward, run for a second time.
    backward = self.needed([*self.dx, *self.dparams], at_hand)
    return {v for e in backward for v in e.outvars} & self.per_microbatch - self.cotangents

  def backward_of_cotangents(self) -> list[Equation]:
    """Returns the equations of the backward pass that read or make a cotangent."""
    return [
      e
      for e in self.needed([*self.dx, *self.dparams], self.dy)
      if any(v in self.cotangents for v in [*eq.used([e]), *e.outvars])
    ]

  def slices(
    self,
    made: dict[Kind, list[Var]],
    waiting: Sequence[Var],
    rereads: Collection[Kind] = (),
  ) -> LayerSplit:
    """Takes the slices of all actions from the list of equations.

    [1] Saved values are numbered: those of F, then of R, then of I.
    [2] A slice has the equations between what is known to its action and what it is to compute.
    [3] The last of R, I and W that reads a value frees its memory.

    Args:
      made: for F, R and I, the variables that the action leaves for later ones.
      waiting: the variables that W reads, of all actions before it.
      rereads: the actions that run the forward again from x, which they have at hand.
    """
    saved = [(v, kind) for kind, variables in made.items() for v in variables]  # [1]
    number = {v: n for n, (v, _) in enumerate(saved)}

    def slice_(
      inputs: Sequence[Var], known: Iterable[Var], outputs: Sequence[Any], *makes: Kind
    ) -> Slice:  # [2]
      left = [v for kind in makes for v in made[kind]]
      wanted = [*outputs, *left]
      equations = self.needed(wanted, [*inputs, *known])
      # Not all that is known: by [3], a value lives until the last slice that takes it.
      reads = [v for v in eq.used(equations, wanted) if v in number and v in {*known}]
      return Slice(
        inputs=[*self.given, *reads, *inputs],
        equations=equations,
        outputs=wanted,
        consts=self.consts,
        reads=tuple(number[v] for v in reads),
        makes=tuple(number[v] for v in left),
      )

    at_hand = [*made[Kind.F], *made[Kind.R]]
    x = {kind: self.x if kind in rereads else [] for kind in (Kind.R, Kind.I, Kind.B)}
    slices = {
      Kind.R: slice_(x[Kind.R], made[Kind.F], [], Kind.R),
      Kind.I: slice_([*x[Kind.I], *self.dy], at_hand, self.dx, Kind.I),
      Kind.W: slice_([], waiting, self.dparams),
    }
    last: dict[Var, Kind] = {}
    for kind, one in slices.items():  # [3] in the order in which they run: a later one overwrites
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
  """Returns a variable of the tape as a saved value."""
  return Saved(variable.aval.shape, variable.aval.dtype, made, last)


def _vjp(
  layer: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]],
  params: Tree,
  inputs: Tree,
  x: Tree,
  dy: Leaves,
  policy: Callable[..., bool] | None,
) -> tuple[Tree, Tree, Leaves, Leaves, Tree]:
  """Runs a layer forwards and backwards; returns y, aux, the residuals, dx and dparams."""

  def run(params: Tree, floats: Leaves, x: Tree, inputs: Tree) -> tuple[Leaves, Tree]:
    y, aux = layer(params, inputs, with_float_leaves(x, floats))
    # Only float leaves have cotangents; y goes out whole beside them, undifferentiated.
    return float_leaves(y), (y, aux)

  # With `jax.checkpoint`, what the policy drops is computed again by equations of the backward.
  kept = run if policy is None else jax.checkpoint(run, policy=policy)
  _, back, (y, aux) = jax.vjp(
    lambda params, floats: kept(params, floats, x, inputs), params, float_leaves(x), has_aux=True
  )
  dparams, dx = back(dy)
  # What `jax.vjp` returns is a pytree, whose leaves are the residuals.
  return y, aux, jax.tree.leaves(back), dx, dparams


def _stand_ins(y: Tree, like: Sequence[Any]) -> Leaves:
  """Returns zeros of the types of y's float cotangents, which vary where any of `like` does."""
  axes = axes_of(like)
  zeros: Leaves = vary([jnp.zeros(leaf.shape, leaf.dtype) for leaf in float_leaves(y)], axes)
  return zeros


def _batch_leaves(params: Tree, inputs: Tree) -> list[int]:
  """Returns the indices of the leaves of `inputs["batch"]` among those of `(params, inputs)`."""
  found = jax.tree.leaves_with_path((params, inputs))
  batch = (jax.tree_util.SequenceKey(1), jax.tree_util.DictKey("batch"))
  return [i for i, (path, _) in enumerate(found) if path[:2] == batch]


def _warn_of_effects(equations: Sequence[Equation]) -> None:
  """Warns of prints and callbacks: slices leave out or repeat what no value depends on."""
  if names := sorted({*_callbacks(equations)}):
    warnings.warn(
      f"a layer calls {', '.join(names)}, which a pipeline leaves out or repeats: it computes"
      " values only; run jaxpipe.reference_value_and_grad to see what a layer prints",
      stacklevel=2,
    )


def _callbacks(equations: Sequence[Equation]) -> Iterator[str]:
  """Yields the names of primitives that call Python, those in loops and branches included."""
  for equation in equations:
    name = str(equation.primitive.name)
    # Effects alone do not tell: a sum over a mesh axis has one too, which names the axis.
    if equation.effects and ("debug" in name or "callback" in name):
      yield name
    for body in bodies(equation):
      yield from _callbacks(body.eqns)


def _take(items: Sequence[Any], *counts: int) -> list[list[Any]]:
  """Divides `items` into consecutive lists of these lengths, which must add up to all of them."""
  out, at = [], 0
  for count in counts:
    out.append(list(items[at : at + count]))
    at += count
  assert at == len(items)
  return out
