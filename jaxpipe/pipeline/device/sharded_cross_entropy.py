"""Softmax cross-entropy over a vocabulary that is cut over the stages, with one barrier.

Every device d holds V / P rows of the head's table [V, D]; h [N, D] is what the table multiplies.

    score  l = h table_d'    m = max l    e = exp(l - m)    s = sum e    a = e table_d
    join   lse = log sum_d exp(m_d) s_d              loss = sum_N w (lse - l[target])
           dh = w (sum_d exp(m_d - lse) a_d - table[target])
    dtable (w exp(m_d - lse) e_d - w [target])' h

Before the barrier every device works on its own shard (`score`, the action S); at the barrier all
devices reduce over the stage axis (`join` and `dh`); after it each finds the gradient of its shard
(`dtable`, the action T). This is Algorithm 2 of Yeung et al., 2024, arXiv:2411.05288: because
`score` multiplies e by the table already, one barrier gives both loss and dh. Maxima and sums are
in float32 at least.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.storage.rings import wide


class Score(NamedTuple):
  """One device's share of the softmax of N tokens, over the V / P rows of its shard.

  Attributes:
    m: [N], the largest logit of the shard.
    s: [N], the sum of exp(logit - m) over the shard.
    target: [N], the target's logit, 0 where its row lies in another shard.
    best: int32 [N], the first row of the whole table that has the logit m, for the accuracy.
    e: [N, V / P], exp(logit - m), in the dtype of h.
    a: [N, D], e times the shard of the table.
  """

  m: jax.Array
  s: jax.Array
  target: jax.Array
  best: jax.Array
  e: jax.Array
  a: jax.Array


class Targets(NamedTuple):
  """Where the targets lie in one device's shard.

  Attributes:
    row: int32 [N], within the shard; 0 where the target's row lies elsewhere.
    inside: bool [N], whether it lies here.
    weight: [N], 0 for padding.
  """

  row: jax.Array
  inside: jax.Array
  weight: jax.Array


def find(targets: jax.Array, weights: jax.Array, rows: int) -> Targets:
  """Returns where targets, int [...] of N tokens, lie in this device's shard of `rows` rows."""
  row = targets.reshape(-1) - first_row(rows)
  inside = (row >= 0) & (row < rows)
  return Targets(jnp.where(inside, row, 0), inside, weights.reshape(-1))


def known(target: jax.Array, targets: jax.Array, weights: jax.Array, V: int) -> jax.Array:
  """Returns the targets' logits [N], NaN for a target outside the table's V rows.

  A loss over the whole table would be NaN there, too. Where the weight is 0, which is how padding
  is marked, whatever the target is does not count.
  """
  targets, weights = targets.reshape(-1), weights.reshape(-1)
  return jnp.where((targets >= 0) & (targets < V) | (weights == 0), target, jnp.nan)


def first_row(rows: int) -> jax.Array:
  """Number of this device's first row in the whole table."""
  return lax.axis_index(STAGE) * rows


def score(h: jax.Array, table: jax.Array, targets: Targets) -> Score:
  """S before its barrier: the logits of h [N, D] over the shard [V / P, D], summed up.

  Each device subtracts the largest logit of its own shard; `join` brings all of them to one.
  """
  exact = wide(h.dtype)
  table = table.astype(h.dtype)
  logits = jnp.einsum("ND,VD->NV", h, table, preferred_element_type=exact)
  m = logits.max(axis=1)
  e = jnp.exp(logits - m[:, None])
  own = jnp.take_along_axis(logits, targets.row[:, None], axis=1)[:, 0]
  return Score(
    m=m,
    s=e.sum(axis=1),
    target=jnp.where(targets.inside, own, 0),
    best=jnp.argmax(logits, axis=1).astype(jnp.int32) + first_row(len(table)),
    e=e.astype(h.dtype),
    a=jnp.einsum("NV,VD->ND", e.astype(h.dtype), table, preferred_element_type=exact),
  )


def join(
  m: jax.Array, s: jax.Array, target: jax.Array, best: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Reduces over all shards; returns log-sum-exp, the target's logit and the best row, [N] each."""
  top = lax.pmax(m, STAGE)
  lse = top + jnp.log(lax.psum(s * jnp.exp(m - top), STAGE))
  # Of equal logits the first row counts, as `argmax` over the whole table would find.
  first = lax.pmin(jnp.where(m == top, best, jnp.iinfo(jnp.int32).max), STAGE)
  return lse, lax.psum(target, STAGE), first


def dh(a: jax.Array, scale: jax.Array, table: jax.Array, targets: Targets) -> jax.Array:
  """Sums over all shards the gradient of h, [N, D], given scale = exp(m - lse), [N]."""
  own = jnp.where(targets.inside[:, None], table[targets.row].astype(a.dtype), 0)
  part = targets.weight[:, None].astype(a.dtype) * (scale[:, None] * a - own)
  total: jax.Array = lax.psum(part, STAGE)
  return total


def dtable(e: jax.Array, scale: jax.Array, h: jax.Array, targets: Targets) -> jax.Array:
  """T: the gradient of the shard of the table, [V / P, D]."""
  weight = targets.weight.astype(scale.dtype)
  p = e * (scale * weight)[:, None]
  p = p.at[jnp.arange(len(p)), targets.row].add(-weight * targets.inside)
  return jnp.einsum("NV,ND->VD", p.astype(h.dtype), h, preferred_element_type=scale.dtype)
