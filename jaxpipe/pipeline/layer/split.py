"""Splits a layer's forward and backward pass into the actions F, R, I and W.

Zero-bubble schedules (Qi et al., arXiv:2401.10241) run the two halves of a backward pass at
different times: `I`, the gradient of the input, is on the critical path; `W`, the gradient of the
weights, can wait. Nobody has to write the halves. Forward and `jax.vjp` of the layer are traced
once, to one list of equations, and each action gets the equations that it needs. What one action
leaves for a later one is a *saved value*:

      params, inputs ──┬─────────────┬──────────────┬──────────────────┐
                       ▼             ▼              ▼                  ▼
      x ────────────▶ [1] F ──────▶ [2] R ───────▶ [3] I ──────────▶ [4] W ──▶ dparams
                       │   kept         remade      │ ▲     waiting
                       ▼                         dx◀┘ └─dy
                       y

For `y = x + tanh(x @ A) @ B` under the policy `dots`, which keeps matmuls with weights:

    forward               backward                      action  reads         leaves
    h = x @ A             dt = dy @ B.T                 F       x             x, h (kept)
    t = tanh h            dh = dt * (1 - t * t)         R       h             t, 1 - t (remade)
    y = x + t @ B         dx = dy + dh @ A.T            I       t, 1 - t, dy  dy, dh
                          dA = x.T @ dh, dB = t.T @ dy  W       x, t, dy, dh

R computes t again, I computes dt, dh and dx, and W the two products of dA and dB; what waits for W
is x, t, dy and dh. In a schedule without R, I does R's work and leaves t for W. A fused B is I and
W in one slice, which leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.slices import LayerSplit, Slice
from jaxpipe.pipeline.layer.tape import Tape
from jaxpipe.pipeline.layer.trace import lenient, trace
from jaxpipe.schedules import Kind

Tree = Any
# (params, inputs, x) -> y, aux: a layer as a function; aux are outputs without a gradient.
Layer = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def forward_only(layer: Layer, params: Tree, inputs: Tree, x: Tree) -> LayerSplit:
  """Returns the split of a layer that is never differentiated: only F and `primal` do anything.

  Args:
    layer: as for `split`; it may hold what cannot be differentiated.
    params: as for `split`.
    inputs: as for `split`.
    x: as for `split`.
  """
  y, aux = jax.eval_shape(lenient(layer), params, inputs, x)
  forward = Slice.of(trace(layer, params, inputs, x))
  empty = Slice([], [], [], {}, (), ())
  return LayerSplit(
    forward=forward,
    primal=forward,
    recompute=None,
    input_grad=empty,
    weight_grad=empty,
    backward=empty,
    saved=(),
    y_count=len(jax.tree.leaves(y)),
    aux_count=len(jax.tree.leaves(aux)),
    dx_count=0,
  )


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
  """Traces a layer's forward and backward pass and splits it into slices.

  [1] F keeps the residuals: the variables where `jax.vjp`'s forward ends and its backward begins.
  [2] R computes again what the policy did not let F keep.
  [3] I computes dx, and does R's work where there is no R.
  [4] W computes the rest of the parameters' gradients from what F, R and I have left.

  Args:
    layer: `(params, inputs, x) -> y, aux`; y and aux are trees of arrays, aux has no gradient.
    params: tree of float arrays, or stand-ins of the same shapes, dtypes and mesh axes.
    inputs: tree of whatever else the layer reads; never differentiated. Its entry `batch` holds
      data of the microbatch, so that what is computed of it may be kept, like what is computed of
      x. What is computed of all else (keys, numbers) is computed again.
    x: the layer's input; integer and boolean leaves have no gradient.
    policy: a `jax.checkpoint` policy saying what F keeps; None keeps what `jax.vjp` does.
    recompute: whether the schedule has R, which computes again what F did not keep; else I and B
      do.
    from_input: whether F keeps nothing of the layer, since its input x is at hand later: R, or else
      I and B, then run the forward again from x.

  Returns:
    The slices.
  """
  tape = Tape.trace(layer, params, inputs, x, policy)
  # [1] `used` lists each variable once, so that equal residuals are kept once. A residual that is
  # made of parameters, keys or numbers alone is computed again where it is read; one that is a
  # parameter or an input, the batch among them, is at hand.
  residuals = [
    v for v in eq.used([], tape.residuals) if v in tape.per_microbatch and v not in tape.given
  ]
  rereads = frozenset([Kind.R] if recompute else [Kind.I, Kind.B]) if from_input else frozenset()
  kept = tape.read_by_backward(residuals) if Kind.I not in rereads else []
  at_hand = [*kept, *tape.dy, *(tape.x if Kind.I in rereads else [])]
  # [2] What the backward computes from there without a cotangent is recomputation. R leaves only
  # those of its values that an equation with a cotangent reads.
  recomputed = tape.recomputed(at_hand)
  remade = []
  if recompute and not from_input:
    remade = [v for v in eq.used(tape.backward_of_cotangents()) if v in recomputed]
  # [3] I computes all that dx needs and all that is recomputed, also what only dparams need. Left
  # to W, the attention's output would be recomputed there from its scores, and the scores, which
  # the policy exists to drop, would have to wait for W.
  in_i = tape.needed([*tape.dx, *recomputed], [*at_hand, *remade])
  # [4] Of dparams, W computes what I has not: what it reads of the variables that are computed by
  # then and differ between microbatches has to wait for it.
  done = {*at_hand, *remade, *(v for e in in_i for v in e.outvars)} & tape.per_microbatch
  in_w = tape.needed(tape.dparams, done)
  waiting = [v for v in eq.used(in_w, tape.dparams) if v in done]
  # Where R runs the forward again from x, it leaves what F would have kept.
  made = {Kind.F: [], Kind.R: kept} if Kind.R in rereads else {Kind.F: kept, Kind.R: remade}
  made[Kind.I] = [v for v in waiting if v not in {*kept, *remade}]
  return tape.slices(made, waiting, rereads)
