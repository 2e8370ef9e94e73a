"""Causal attention over rows whose positions lie over axis `sequence`, in one of three ways.

How many of the c devices along the axis trade positions for heads (`ulysses`) decides the way:

    1           ring attention: queries stay, keys and values visit (`ring_attention`)
    c           every device attends over the whole row with some of the heads (DeepSpeed-Ulysses,
                Jacobs et al., arXiv 2309.14509)
    between     both: groups of `ulysses` devices trade, and blocks visit group by group (USP, Fang
                and Zhao, arXiv 2405.07719)

On one device, and where a device has the whole row, attention is the `core` that the configuration
names. Grouped-query heads: N / K query heads share a key head.

Dims: B batch rows, T positions of this device, S positions of the whole row, N query heads, K
key/value heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpipe.models.transformer.attention_blocks import Keys, Queries, add, by_key_head, result
from jaxpipe.models.transformer.ring_attention import ring_attention
from jaxpipe.parallel import axes, sequence
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR

Core = Callable[..., jax.Array]


def check_heads(heads: int, kv_heads: int, tensor: int, ulysses: int, sequence: int) -> None:
  """Checks that the heads can be cut over the mesh.

  Args:
    heads: query heads of the model.
    kv_heads: key/value heads of the model.
    tensor: devices along `tensor`, over which both are cut.
    ulysses: devices along `sequence` that trade positions for heads.
    sequence: devices along `sequence`.

  Raises:
    ValueError: one of the numbers does not divide the other.
  """
  for name, count in (("heads", heads), ("kv_heads", kv_heads)):
    if count % tensor:
      below, above = count // tensor * tensor, (count // tensor + 1) * tensor
      near = f"{below} or {above}" if below else f"{above}"
      raise ValueError(f"{count} {name} cannot be cut over {TENSOR}:{tensor}; use {near} {name}")
  own = heads // tensor
  fits = [n for n in range(1, sequence + 1) if sequence % n == 0 and own % n == 0]
  if ulysses in fits:
    return
  near = " or ".join(
    map(str, [n for n in fits if n < ulysses][-1:] + [n for n in fits if n > ulysses][:1])
  )
  if ulysses < 1 or sequence % ulysses:
    raise ValueError(
      f"ulysses={ulysses} does not divide the {sequence} devices of {SEQUENCE}:{sequence};"
      f" use ulysses={near}"
    )
  cut = f" ({heads} over {TENSOR}:{tensor})" if tensor > 1 else ""
  raise ValueError(
    f"ulysses={ulysses} over {SEQUENCE}:{sequence} does not divide the {own} heads of a device"
    f"{cut}; use ulysses={near}"
  )


def attend(
  query_BTNH: jax.Array,
  key_BTKH: jax.Array,
  value_BTKH: jax.Array,
  *,
  core: Core,
  ulysses: int = 1,
  segments_BS: jax.Array | None = None,
  length: int,
) -> jax.Array:
  """Causal attention with grouped-query heads; head n reads key head n // (N / K).

  Args:
    query_BTNH: [B, T, N, H], this device's positions and heads; T = length / c.
    key_BTKH: [B, T, K, H], K a divisor of N.
    value_BTKH: [B, T, K, H].
    core: `(query, key, value, is_causal=True) -> mixed`, used where a device has whole rows in
      natural order and no segments: on an axis of one device, and with `ulysses` = c.
    ulysses: devices that trade positions for heads; divides c and N. On an axis of one device it is
      not read.
    segments_BS: int [B, length], the documents of the whole rows: queries see keys of their own.
      None: the row is one document.
    length: S, positions of the whole row.

  Returns:
    [B, T, N, H] in the query's dtype.

  Raises:
    ValueError: shapes that do not divide, or that are not those of `length`.
  """
  c, T, N, K = axes.size(SEQUENCE), *query_BTNH.shape[1:3], key_BTKH.shape[2]
  ulysses = ulysses if c > 1 else 1
  _check_shapes(T, c, length, segments_BS)
  check_heads(N, K, 1, ulysses, c)
  # As many copies of each key head as give all devices of a group the same number.
  copies = math.lcm(K, ulysses) // K
  if copies > 1:
    key_BTKH, value_BTKH = (jnp.repeat(x, copies, axis=2) for x in (key_BTKH, value_BTKH))
  q, k, v = (sequence.to_heads(x, ulysses) for x in (query_BTNH, key_BTKH, value_BTKH))
  if c > ulysses:
    mixed = ring_attention(q, k, v, segments_BS, ulysses)
  elif segments_BS is None:
    mixed = core(q, k, v, is_causal=True)
  else:
    # A core knows no documents: the whole row as one block, which does.
    queries, keys = Queries(by_key_head(q, k), segments_BS), Keys(k, v, segments_BS)
    mixed = result(add(None, queries, keys, causal=True), q.dtype)
  return sequence.to_positions(mixed, ulysses)


def _check_shapes(T: int, c: int, length: int, segments_BS: jax.Array | None) -> None:
  """Raises ValueError where this device's positions or the segments are not those of the row."""
  sequence.check_divides(length, c)
  if T * c != length:
    raise ValueError(
      f"{T} positions on each device of {SEQUENCE}:{c} are not a row of {length}; use {length // c}"
    )
  if segments_BS is not None and segments_BS.shape[1] != length:
    raise ValueError(
      f"segments of {segments_BS.shape[1]} positions for rows of {length}; every device takes those"
      " of the whole row"
    )
