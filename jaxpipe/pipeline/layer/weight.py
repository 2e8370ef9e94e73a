"""The weight that loss and gradients are divided by, and the scale of the loss in float16.

The mean loss is `sum(loss_sum) / sum(weight)`. Its gradient is taken of the sums and divided once,
after the last microbatch, whose weight the first ones do not know. In float16, whose largest number
is 65504, the gradient of a sum over many rows overflows where that of the mean does not. There the
sum is multiplied by a power of two near `1 / weight` before it is differentiated, and the gradients
are divided by it again in float32, which is exact. What does not compute in float16 is not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.layer import equations as eq
from jaxpipe.pipeline.layer.interpret import Equation, bodies
from jaxpipe.pipeline.layer.slices import Slice

Tree = Any


def divisor(weight: jax.Array, dtype: Any) -> jax.Array:
  """What sums are divided by to become means: the weight, or infinity where it is zero.

  A sum over nothing is then the mean 0, and not NaN; a sum that is not finite stays NaN.

  Args:
    weight: [], the sum of all weights.
    dtype: of the result.
  """
  return jnp.where(weight == 0, jnp.array(jnp.inf, dtype), weight.astype(dtype))


def uses_float16(equations: Iterable[Equation]) -> bool:
  """Whether an equation makes or reads a float16 array, those in bodies of loops included."""
  return any(
    any(getattr(v.aval, "dtype", None) == jnp.float16 for v in (*one.invars, *one.outvars))
    or any(uses_float16(body.eqns) for body in bodies(one))
    for one in equations
  )


def scale_of(weight: jax.Array) -> jax.Array:
  """The largest power of two that is at most `1 / weight`, float32 []; 1 for a weight below 1."""
  weight = jnp.where(jnp.isfinite(weight) & (weight > 1), weight, 1).astype(jnp.float32)
  mantissa, exponent = jnp.frexp(weight)  # weight = mantissa * 2 ** exponent, mantissa < 1
  return jnp.ldexp(jnp.float32(1), -jnp.where(mantissa == 0.5, exponent - 1, exponent))


def weight_from_batch(
  head: Slice, is_batch: Sequence[bool]
) -> Callable[[Sequence[jax.Array]], jax.Array] | None:
  """Returns the head's weight as a function of the batch, without the rest of the head.

  Args:
    head: the head, or a stage that ends with it: its outputs begin with `loss_sum` and `weight`.
    is_batch: for each of its inputs, whether it is a leaf of the batch.

  Returns:
    Leaves of a microbatch -> weight []; None where the weight depends on anything else.
  """
  given = [v for v, yes in zip(head.inputs, is_batch, strict=True) if yes]
  others = {v for v, yes in zip(head.inputs, is_batch, strict=True) if not yes}
  weight = head.outputs[1]
  equations = eq.needed([weight], head.equations, {*given})
  if others & {*eq.used(equations, [weight])}:
    return None

  def run(leaves: Sequence[jax.Array]) -> jax.Array:
    values = head.consts | dict(zip(given, leaves, strict=True))
    out: jax.Array = eq.evaluate(equations, values, [weight])[0]
    return out

  return run
