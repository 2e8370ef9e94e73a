"""Routing of tokens to experts: the choice, the slots of a capacity, and the losses of unevenness.

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
  """The experts that each token visits, and with which weights.

  Attributes:
    logits_BTE: the router's scores, float32 at least.
    chosen_BTK: int32, numbers of the experts, best first; of equal scores the lower number.
    weights_BTK: factor of each expert's result, in the dtype of the scores.
  """

  logits_BTE: jax.Array
  chosen_BTK: jax.Array
  weights_BTK: jax.Array


class Slots(NamedTuple):
  """The tokens in the slots of the experts, and the slots of the tokens.

  Both directions are held, so that tokens go to slots and back by reading rows: nothing of width D
  is ever sorted or scattered.

  Attributes:
    token_EGC: int, the token in each slot, counted through the groups; N where it is empty.
    slot_NK: int, the slot of each token's choices, counted through [E, G, C]; E G C if dropped.
  """

  token_EGC: jax.Array
  slot_NK: jax.Array


def route(x_BTD: jax.Array, router_DE: jax.Array, top_k: int, normalize: bool) -> Routes:
  """Chooses the experts of every token.

  Args:
    x_BTD: the tokens, as the router sees them.
    router_DE: the router's matrix, a column for each expert.
    top_k: K, experts that a token visits.
    normalize: whether a token's weights are made to sum to 1.

  Returns:
    The routes. Gradients reach the router through scores and weights, not through the choice.
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
  """Returns this device's share of the router losses of every row, [B], summed over positions.

  Of a row of T positions in all, with p the softmax of the logits and count_e its choices of e:

      balance * T * sum_e f_e P_e     f_e = E / (K T) * count_e, P_e = mean over positions of p_e
      z * sum over positions of logsumexp(logits)^2

  The first is the sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437), 1 for every
  position when all is even; the second the router z-loss of ST-MoE (arXiv 2202.08906). Counts have
  no derivative.

  Args:
    routes: routes of the positions that this device holds.
    balance: coefficient of the balance loss.
    z: coefficient of the z-loss.
    cut: mesh axes over which a row's positions lie.
    whole: those of them along which every device returns the sum of all shares.
  """
  E, (_, T, K) = routes.logits_BTE.shape[-1], routes.chosen_BTK.shape
  probability_BE = jnp.sum(jax.nn.softmax(routes.logits_BTE), axis=1)
  counts_BE = axes.total(_counts(routes.chosen_BTK.reshape(-1, T * K), E), cut)
  # A whole row has T positions on each of the devices along `cut`.
  often_BE = counts_BE.astype(probability_BE.dtype) * (E / (K * T * axes.size(cut)))
  top_BT = jax.nn.logsumexp(routes.logits_BTE, axis=-1)
  uneven_B = jnp.sum(often_BE * probability_BE, axis=-1)
  return axes.total(balance * uneven_B + z * jnp.sum(top_BT**2, axis=-1), whole)


def group_size(group: int, positions: int, pieces: int, runs: int) -> int:
  """Returns S, the positions of a group, after checking that groups are the same on every mesh.

  Args:
    group: S as it was asked for; 0 is the whole row.
    positions: number of positions of each row that this device holds.
    pieces: number of devices over which a row lies.
    runs: number of equally long runs that these positions make up, each contiguous in the row.

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
  """Gives the tokens of each group slots at their experts, first come, first served.

  All first choices of a group come before all second ones, each in the order of the positions.

      [1] Sort the choices of a group by expert, stably: expert 0's queue, then expert 1's, ...
      [2] A choice's rank in its queue is its place in the sorted list less the queue's start. Ranks
          below C are slots; the others are dropped.
      [3] The other way round, slot c of an expert holds the token at place start + c, unless the
          queue is shorter.

  Args:
    chosen_GSK: int, the experts that each token wants, no expert twice.
    experts: E.
    capacity: C.

  Returns:
    Tokens by slots and slots by tokens.
  """
  G, S, K = chosen_GSK.shape
  E, C = experts, capacity
  wanted_GP = chosen_GSK.transpose(0, 2, 1).reshape(G, K * S)
  order_GP = jnp.argsort(wanted_GP, axis=1, stable=True)  # [1]
  counts_GE = _counts(wanted_GP, E)
  starts_GE = jnp.cumsum(counts_GE, axis=1) - counts_GE
  group_G1 = jnp.arange(G)[:, None]

  # [2]: the sort of a permutation is its inverse, here the place of each choice in the list.
  rank_GP = jnp.argsort(order_GP, axis=1) - jnp.take_along_axis(starts_GE, wanted_GP, axis=1)
  slot_GP = jnp.where(rank_GP < C, (wanted_GP * G + group_G1) * C + rank_GP, E * G * C)
  slot_NK = slot_GP.reshape(G, K, S).transpose(0, 2, 1).reshape(G * S, K)

  # [3]: places beyond the list are clipped here, and masked by the counts below.
  rank_11C = jnp.arange(C)[None, None, :]
  place_GEC = jnp.minimum(starts_GE[:, :, None] + rank_11C, K * S - 1)
  token_GX = jnp.take_along_axis(order_GP, place_GEC.reshape(G, E * C), axis=1) % S
  token_GEC = (group_G1 * S + token_GX).reshape(G, E, C)
  token_GEC = jnp.where(rank_11C < counts_GE[:, :, None], token_GEC, G * S)
  return Slots(token_GEC.transpose(1, 0, 2), slot_NK)


def _counts(chosen_GP: jax.Array, experts: int) -> jax.Array:
  """The number of times that each expert is chosen: int [G, P] -> int32 [G, E]."""
  same_GPE = chosen_GP[:, :, None] == jnp.arange(experts)[None, None, :]
  return jnp.sum(same_GPE, axis=1, dtype=jnp.int32)
