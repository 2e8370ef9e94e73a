"""PRNG keys that draw for every row by itself, so that any layer drops alike on every mesh.

A layer that calls `jax.random.bernoulli(key, p, x.shape)` draws one mask for all the rows that it
is given. Over a data axis each device holds some rows of a microbatch, and with one key all of them
would draw the same mask for rows that differ. The keys made here carry the numbers of the rows, as
further words behind those of a threefry key. What is drawn for R rows is drawn row by row, keyed by
the row's number in the whole microbatch; anything else is drawn once, and is the same everywhere:

    words of a key     k0 k1 | row 0 ... row R-1
    bits of [R, ...]   for each row: threefry(fold_in(k0 k1, row)) of [...]
    bits of [...]      threefry(k0 k1) of [...]

It is an implementation of JAX's typed keys, by `jax.extend.random.define_prng_impl`. So it works in
whatever way a layer draws: `nnx.Rngs`, Linen's `make_rng`, inside `scan`, `vmap` or `remat`.

A number of rows may also be the size of another dim by chance. `Draws` tells the shapes apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.random import define_prng_impl

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module.jaxprs import equations

Tree = Any
Shape = tuple[int, ...]

# Folded into a key before its words are taken.
_OWN_STREAM = 0x726F7773

_BITS = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint64}


@dataclasses.dataclass(frozen=True)
class Draws:
  """What a module draws from its keys, by the shapes of the draws.

  Attributes:
    once: shapes of draws that have no dim of rows, `[...]`.
    by_row: shapes of draws for every row, without the leading dim of rows.
  """

  once: frozenset[Shape] = frozenset()
  by_row: frozenset[Shape] = frozenset()

  def clash(self, rows: int) -> Shape | None:
    """A shape that is drawn once, and for so many rows as well; None where there is none."""
    return next((s for s in self.once if s[:1] == (rows,) and s[1:] in self.by_row), None)


def row_key(key: jax.Array, rows: jax.Array, once: frozenset[Shape] = frozenset()) -> jax.Array:
  """Makes a key that draws by rows.

  Args:
    key: a typed PRNG key of any implementation, or a raw one.
    rows: int32 [R], each row's number within the whole microbatch.
    once: shapes beginning with R that are drawn once.

  Returns:
    A scalar typed key.
  """
  # Two words of a stream of its own: of whatever implementation the key is, the rest is threefry.
  # Without the number, they would be the words of `fold_in(key, 1)`, which others may draw from.
  base = jax.random.bits(jax.random.fold_in(key, _OWN_STREAM), (2,), jnp.uint32)
  words = jnp.concatenate([base, rows.astype(jnp.uint32)])
  own = frozenset(shape for shape in once if shape[:1] == rows.shape)
  return jax.random.wrap_key_data(words, impl=_by_rows(rows.shape[0], own))


def no_key(rows: int, why: str) -> jax.Array:
  """Makes a key from which nothing can be drawn.

  Args:
    rows: R.
    why: the message of the `StackError` that a draw raises when its program is compiled.
  """
  return jax.random.wrap_key_data(jnp.zeros(2 + rows, jnp.uint32), impl=_refusing(rows, why))


def draws_of(smaller: core.ClosedJaxpr, larger: core.ClosedJaxpr, rows: int, name: str) -> Draws:
  """Reads from two traces of a module, of R and R + 1 rows, what it draws for every row.

  Args:
    smaller: its trace for R rows.
    larger: its trace for R + 1 rows.
    rows: R.
    name: how messages name the module.

  Raises:
    StackError: a draw whose shape depends on the number of rows in another way than by its first
      dim, which would not be the same on every mesh.
  """
  once, by_row = set(), set()
  for one, other in zip(_drawn(smaller), _drawn(larger), strict=True):
    a, b = one.shape, other.shape
    if a == b:
      once.add(a)
    elif not one.row_key:
      raise StackError(
        f"{name} draws random numbers for its rows from a key of its own making, the same for all"
        " microbatches and devices: take a key of the call, nnx.Rngs(context.key)"
      )
    elif (a[:1], b[:1]) == ((rows,), (rows + 1,)) and a[1:] == b[1:]:
      by_row.add(a[1:])
    else:
      raise StackError(
        f"{name} draws random numbers of shape {a} for {rows} rows and {b} for {rows + 1}: on a"
        " mesh that cuts rows they would not be those of one device; draw with the rows as first"
        " dim"
      )
  return Draws(frozenset(once), frozenset(by_row))


def draws_any(jaxpr: core.ClosedJaxpr) -> bool:
  """Whether a trace draws random numbers at all."""
  return bool(_drawn(jaxpr))


class _Draw(NamedTuple):
  """A draw, or a split of a key, in a jaxpr.

  Attributes:
    shape: of what is drawn.
    row_key: whether its key draws by rows.
  """

  shape: Shape
  row_key: bool


def _drawn(jaxpr: core.ClosedJaxpr) -> list[_Draw]:
  """All draws and splits of a jaxpr, in order."""
  # A key's dtype has no public attribute for its implementation; its name ends in the tag.
  return [
    _Draw(tuple(e.params["shape"]), "<rows>" in str(e.invars[0].aval.dtype))
    for e in equations(jaxpr)
    if e.primitive.name in ("random_bits", "random_split")
  ]


@functools.cache
def _by_rows(R: int, once: frozenset[Shape]) -> Hashable:
  """The PRNG implementation for R rows: keys are uint32 [2 + R]."""

  def of_rows(words: jax.Array) -> jax.Array:
    """A threefry key for every row: [R]."""
    return jax.vmap(lambda row: jax.random.fold_in(_threefry(words), row))(words[2:])

  def by_rows(shape: Sequence[int]) -> bool:
    return tuple(shape[:1]) == (R,) and tuple(shape) not in once

  def bits(words: jax.Array, width: int, shape: Shape) -> jax.Array:
    if by_rows(shape):
      return jax.vmap(lambda key: jax.random.bits(key, shape[1:], _BITS[width]))(of_rows(words))
    return jax.random.bits(_threefry(words), shape, _BITS[width])

  def split(words: jax.Array, shape: Shape) -> jax.Array:
    # One key for every row, as `nnx.split_rngs` makes for a module that is mapped over rows.
    if by_rows(shape):
      keys = jax.vmap(lambda key: jax.random.split(key, shape[1:]))(of_rows(words))
    else:
      keys = jax.random.split(_threefry(words), shape)
    return with_rows(keys, words)

  def fold_in(words: jax.Array, number: Any) -> jax.Array:
    return with_rows(jax.random.fold_in(_threefry(words), number), words)

  def with_rows(keys: jax.Array, words: jax.Array) -> jax.Array:
    base = jax.random.key_data(keys)
    return jnp.concatenate([base, jnp.broadcast_to(words[2:], (*base.shape[:-1], R))], -1)

  return define_prng_impl(
    key_shape=(2 + R,),
    seed=_seed,
    split=split,
    random_bits=bits,
    fold_in=fold_in,
    name="rows",
    tag="rows",
  )


@functools.cache
def _refusing(R: int, why: str) -> Hashable:
  """A PRNG implementation with keys as of `_by_rows`, which refuses to draw."""

  def refuse(words: jax.Array, width: int, shape: Shape) -> jax.Array:
    raise StackError(why)

  def split(words: jax.Array, shape: Shape) -> jax.Array:
    return jnp.broadcast_to(words, (*shape, 2 + R))

  return define_prng_impl(
    key_shape=(2 + R,),
    seed=_seed,
    split=split,
    random_bits=refuse,
    fold_in=lambda words, number: words,
    name="none",
    tag="none",
  )


def _seed(seed: jax.Array) -> jax.Array:
  raise StackError("a key of rows is made by row_key, not from a seed")


def _threefry(words: jax.Array) -> jax.Array:
  """The threefry key in front of the rows."""
  return jax.random.wrap_key_data(words[:2], impl="threefry2x32")
