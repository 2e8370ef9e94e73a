"""Runs the operations of one variable on this device's piece of it.

An operation that works element by element runs on pieces, and a reduction to one number adds up the
devices' shares. Only what looks at a tensor otherwise, such as a matrix product, has its operands
joined, one variable at a time; what it returns is cut again as soon as a piece meets it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.update.cuts import Cut, is_reduction, looped, reduced
from jaxpipe.pipeline.update.dataflow import Constant, Operation

# Primitives that work element by element, on operands of one shape or of none.
_NAMES = (
  "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp copy cos cosh "
  "digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt integer_pow is_finite le lgamma "
  "log log1p logistic lt max min mul ne neg nextafter not or pow real rem round rsqrt "
  "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
  "stop_gradient sub tan tanh xor convert_element_type "
)
_ELEMENTWISE = frozenset(_NAMES.split())
_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})


class Piece(NamedTuple):
  """A value with as many elements as the variable, of which this device has a piece.

  Attributes:
    array: the piece.
    shape: of the whole value: the variable's, or another in which its elements keep their order.
  """

  array: jax.Array
  shape: tuple[int, ...]


def whole(value: Any, cut: Cut) -> Any:
  """The whole of a value, whether it is a piece or not."""
  if isinstance(value, Piece):
    return cut.gather(value.array).reshape(value.shape)
  return value


def piece(value: Any, shape: Sequence[int], cut: Cut) -> jax.Array:
  """This device's piece of a value of the variable's shape, whether it is a piece or not."""
  if isinstance(value, Piece):
    return value.array
  return cut.cut(jnp.broadcast_to(value, shape)) if cut.axes else jnp.broadcast_to(value, shape)


def evaluate(
  operations: Sequence[Operation],
  values: dict[int, Any],
  cut: Cut,
  shape: tuple[int, ...],
  avals: Sequence[Any],
) -> None:
  """Runs operations and adds what they make to `values`.

  Args:
    operations: in order.
    values: number -> array or `Piece`.
    cut: how the variable is cut.
    shape: of the variable.
    avals: shape and dtype of every value.
  """
  for operation in operations:
    args = [ref.value if isinstance(ref, Constant) else values[ref] for ref in operation.ins]
    out_shape = tuple(avals[operation.outs[0]].shape)
    joined = math.prod(shape) == 1
    outs = None if joined else _on_pieces(operation, args, cut, shape, out_shape)
    if outs is None:
      args = [whole(arg, cut) for arg in args]
      if is_reduction(operation.name):
        args = [looped(operation.name, args[0])]
      outs = operation.run(*args)
    values.update(zip(operation.outs, outs, strict=True))


def _on_pieces(
  operation: Operation,
  args: list[Any],
  cut: Cut,
  shape: tuple[int, ...],
  out_shape: tuple[int, ...],
) -> Sequence[Any] | None:
  """The results of an operation on pieces; None where it must have whole tensors."""
  name = operation.name
  if name == "broadcast_in_dim" and out_shape == shape and _is_number(args[0]):
    return [Piece(jnp.broadcast_to(jnp.reshape(args[0], ()), cut.piece_shape), out_shape)]
  pieces = [arg for arg in args if isinstance(arg, Piece)]
  if not pieces:
    return None
  if name in _RESHAPES or (name == "broadcast_in_dim" and math.prod(out_shape) == math.prod(shape)):
    return [Piece(args[0].array, out_shape)]
  if name in _ELEMENTWISE and all(arg.shape == out_shape for arg in pieces):
    # Other operands have no dims, or dims of one element that the operation repeats.
    given = [
      arg.array
      if isinstance(arg, Piece)
      else arg
      if jnp.ndim(arg) == 0
      else cut.cut(jnp.broadcast_to(arg, out_shape).reshape(shape))
      for arg in args
    ]
    return [Piece(out, out_shape) for out in operation.run(*given)]
  if is_reduction(name) and _of_all(operation, pieces[0]):
    return [reduced(name, pieces[0].array, cut).reshape(out_shape)]
  return None


def _of_all(operation: Operation, operand: Piece) -> bool:
  """Whether a reduction goes over all elements."""
  axes = operation.params["axes"]
  return all(n == 1 for dim, n in enumerate(operand.shape) if dim not in axes)


def _is_number(value: Any) -> bool:
  """Whether a value is whole and has one element."""
  return not isinstance(value, Piece) and jnp.size(value) == 1
