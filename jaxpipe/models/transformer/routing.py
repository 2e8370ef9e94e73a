"""Which experts a token visits, which of their slots it gets, and what uneven routing costs.

A router scores the experts for every token, the `top_k` best are visited, and their results are
added with weights from the softmax (Mixtral, arXiv 2401.04088). Where an expert has a capacity
(GShard, arXiv 2006.16668; Switch, arXiv 2101.03961), tokens queue for its slots, and those that
find none are dropped. Who stands before whom depends on positions of a row alone, never on the
mesh.

Dims: B rows and T positions that a device holds, D width, E experts, K experts that a token visits,
G groups of S positions each that queue by themselves, N = G S tokens, C slots of a group at an
expert, P = K S places in the queues of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel import axes


class Routes(NamedTuple):
  """Where tokens go.

  Attributes:
    logits_BTE: the router's scores, float32 at least.
    chosen_BTK: int32, the experts, best first; of equal scores the lower number.
    weights_BTK: what each result is multiplied by, in the dtype of the scores.
  """

  logits_BTE: jax.Array
  chosen_BTK: jax.Array
  weights_BTK: jax.Array


class Slots(NamedTuple):
  """Who sits where; both ways, so that nothing of width D is ever sorted or scattered.

  Attributes:
    token_EGC: int, the token in each slot, counted through the groups; N where it is empty.
    slot_NK: int, the slot of each token's choices, counted through [E, G, C]; E G C if dropped.
  """

  token_EGC: jax.Array
  slot_NK: jax.Array


def route(x_BTD: jax.Array, router_DE: jax.Array, top_k: int, normalize: bool) -> Routes:
  """Chooses the experts of every token.

  Args:
    x_BTD: what the router sees.
    router_DE: a column for each expert.
    top_k: K.
    normalize: whether a token's weights are made to sum to 1.
  """
  wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
  # On TPU float32 is multiplied in bfloat16 unless told otherwise, and near ties would go astray.
  logits_BTE = jnp.einsum(
    "BTD,DE->BTE", x_BTD.astype(wide), router_DE.astype(wide), precision=lax.Precision.HIGHEST
  )
  chosen_BTK = lax.top_k(lax.stop_gradient(logits_BTE), top_k)[1]
  weights_BTK = jnp.take_along_axis(jax.nn.softmax(logits_BTE), chosen_BTK, axis=-1)
  if normalize:
    weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True)
  return Routes(logits_BTE, chosen_BTK, weights_BTK)


def row_losses(
  routes: Routes, balance: float, z: float, cut: tuple[str, ...], whole: tuple[str, ...]
) -> jax.Array:
  """Returns this device's share of every row's losses, [B], summed over positions.

  Of a row of T positions in all, with p the softmax of the logits and count_e its choices of e:

      balance * T * sum_e f_e P_e     f_e = E / (K T) * count_e, P_e = mean over positions of p_e
      z * sum over positions of logsumexp(logits)^2

  The first is the sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437), 1 for every
  position when all is even; the second the router z-loss of ST-MoE (arXiv 2202.08906). Counts have
  no derivative.

  Args:
    routes: of the positions that this device holds.
    balance, z: coefficients.
    cut: mesh axes over which a row's positions lie.
    whole: those of them along which every device returns the sum of all shares.
  """
  E, (_, T, K) = routes.logits_BTE.shape[-1], routes.chosen_BTK.shape
  probability_BE = jnp.sum(jax.nn.softmax(routes.logits_BTE), axis=1)
  counts_BE = axes.total(_counts(routes.chosen_BTK.reshape(-1, T * K), E), cut)
  often_BE = counts_BE.astype(probability_BE.dtype) * (E / (K * T * axes.size(cut)))
  top_BT = jax.nn.logsumexp(routes.logits_BTE, axis=-1)
  uneven_B = jnp.sum(often_BE * probability_BE, axis=-1)
  return axes.total(balance * uneven_B + z * jnp.sum(top_BT**2, axis=-1), whole)


def group_size(group: int, positions: int, pieces: int, runs: int) -> int:
  """Returns S, having seen to it that groups are the same on every mesh.

  Args:
    group: S as it was asked for; 0 is the whole row.
    positions: how many of each row this device holds.
    pieces: over how many devices a row lies.
    runs: equally long runs that its positions make up, each contiguous in the row.

  Raises:
    ValueError: 0 where the row lies on several devices, or a group that crosses what one holds.
  """
  run = max(1, positions // runs)
  if not group and pieces == 1:
    return positions
  divisors = [d for d in range(1, run + 1) if run % d == 0]
  if not group:
    raise ValueError(
      f"group 0 is the whole row, and the row lies on {pieces} devices with {positions} positions"
      f" each; use group {' or '.join(map(str, divisors[-2:]))}, or capacity_factor 0"
    )
  if positions % group or run % group:
    near = [max(d for d in divisors if d < group), *[d for d in divisors if d > group][:1]]
    raise ValueError(
      f"groups of {group} positions do not divide the {run} of a row that a device holds on end;"
      f" use group {' or '.join(map(str, near))}, or capacity_factor 0"
    )
  return group


def assign(chosen_GSK: jax.Array, experts: int, capacity: int) -> Slots:
  """Seats the tokens of each group: all first choices before all second ones, in their order.

  Args:
    chosen_GSK: int, the experts that each token wants, no expert twice.
    experts: E.
    capacity: C.
  """
  G, S, K = chosen_GSK.shape
  E, C = experts, capacity
  wanted_GP = chosen_GSK.transpose(0, 2, 1).reshape(G, K * S)
  order_GP = jnp.argsort(wanted_GP, axis=1, stable=True)  # expert 0's queue, then expert 1's, ...
  counts_GE = _counts(wanted_GP, E)
  starts_GE = jnp.cumsum(counts_GE, axis=1) - counts_GE
  group_G1 = jnp.arange(G)[:, None]

  rank_GP = jnp.argsort(order_GP, axis=1) - jnp.take_along_axis(starts_GE, wanted_GP, axis=1)
  slot_GP = jnp.where(rank_GP < C, (wanted_GP * G + group_G1) * C + rank_GP, E * G * C)
  slot_NK = slot_GP.reshape(G, K, S).transpose(0, 2, 1).reshape(G * S, K)

  rank_11C = jnp.arange(C)[None, None, :]
  place_GEC = jnp.minimum(starts_GE[:, :, None] + rank_11C, K * S - 1)
  token_GX = jnp.take_along_axis(order_GP, place_GEC.reshape(G, E * C), axis=1) % S
  token_GEC = (group_G1 * S + token_GX).reshape(G, E, C)
  token_GEC = jnp.where(rank_11C < counts_GE[:, :, None], token_GEC, G * S)
  return Slots(token_GEC.transpose(1, 0, 2), slot_NK)


def _counts(chosen_GP: jax.Array, experts: int) -> jax.Array:
  """How often each expert is chosen, int32 [G, E]."""
  same_GPE = chosen_GP[:, :, None] == jnp.arange(experts)[None, None, :]
  return jnp.sum(same_GPE, axis=1, dtype=jnp.int32)
