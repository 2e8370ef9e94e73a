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

from collections.abc import Callable
from typing import Any

import jax

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.interpret import opened
from jaxpipe.pipeline.layer.slices import LayerSplit, Slice
from jaxpipe.pipeline.layer.tape import Tape
from jaxpipe.schedules import Kind

Tree = Any
Layer = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def forward_only(layer: Layer, params: Tree, inputs: Tree, x: Tree) -> LayerSplit:
  """A layer that is never differentiated: all slices but its forward are empty."""
  y, aux = jax.eval_shape(eq.lenient(layer), params, inputs, x)
  closed = eq.trace(layer, params, inputs, x)
  jaxpr = opened(closed)
  consts = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  forward = Slice(jaxpr.invars, jaxpr.eqns, jaxpr.outvars, consts, (), ())
  none, counts = Slice([], [], [], {}, (), ()), (len(jax.tree.leaves(y)), len(jax.tree.leaves(aux)))
  return LayerSplit(forward, forward, None, none, none, none, (), *counts, 0)


def split(
  layer: Layer,
  params: Tree,
  inputs: Tree,
  x: Tree,
  policy: Callable[..., bool] | None = None,
  *,
  recompute: bool = False,
  from_input: bool = False,
) -> LayerSplit:
  """Traces a layer's forward and backward pass and cuts it.

  Args:
    layer: `(params, inputs, x) -> y, aux`; aux has no gradient.
    params: tree of float arrays, or stand-ins of the same shapes, dtypes and mesh axes.
    inputs: tree of whatever else the layer reads; never differentiated. What is made of the entry
      `batch` differs between microbatches like what is made of x.
    x: its input; integer and boolean leaves pass through without a gradient.
    policy: a `jax.checkpoint` policy saying what F keeps; None keeps what `jax.vjp` does.
    recompute: whether an R of its own computes again what F did not keep; else I and B do.
    from_input: F keeps nothing: R, or I and B, have x at hand and make all again.

  Returns:
    The slices.
  """
  tape = Tape.trace(layer, params, inputs, x, policy)
  # [1] Equal residuals are kept once; those made of parameters or numbers are computed again, and
  # the batch is at hand.
  residuals = [v for v in eq.used([], tape.residuals) if v in tape.moving and v not in tape.given]
  rereads = frozenset([Kind.R] if recompute else [Kind.I, Kind.B]) if from_input else frozenset()
  kept = tape.read_by_backward(residuals) if Kind.I not in rereads else []
  at_hand = [*kept, *tape.dy, *(tape.x if Kind.I in rereads else [])]
  # [2] What of the backward depends on neither the cotangent nor parameters alone.
  again = tape.made_again(at_hand)
  remade = []
  if recompute and not from_input:
    remade = [v for v in eq.used(tape.backward_of_cotangents()) if v in again]
  # [3] I is all that dx needs, and all that is recomputed, for dx or for dparams: left to W, the
  # attention's output would be recomputed there from its scores, and the scores would have to wait.
  in_i = tape.needed([*tape.dx, *again], [*at_hand, *remade])
  # [4] W is the rest: what of dparams I has not computed yet.
  done = {*at_hand, *remade, *(v for e in in_i for v in e.outvars)} & tape.moving
  in_w = tape.needed(tape.dparams, done)
  waiting = [v for v in eq.used(in_w, tape.dparams) if v in done]
  made = {Kind.F: [], Kind.R: kept} if Kind.R in rereads else {Kind.F: kept, Kind.R: remade}
  made[Kind.I] = [v for v in waiting if v not in {*kept, *remade}]
  return tape.cut(made, waiting, rereads)
