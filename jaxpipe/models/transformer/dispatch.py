"""Brings tokens to the devices of their experts and back, in one of two ways.

One is for experts with a capacity, the other for those without. With ep devices to the experts, n
tokens a device, and 1/ep of all experts on each:

    in_slots   an all-to-all of buffers each way (GShard, Lepikhin et al., arXiv 2006.16668); a
               device sends E C G D (ep - 1) / ep elements, or
               capacity_factor * top_k * n D (ep - 1) / ep, and computes all slots, full or not.
    dropless   all tokens to all devices and partial results back: all-gather and reduce-scatter,
               n D (ep - 1) elements each way. No shape may depend on the routing and all tokens may
               want one device, so that an all-to-all would need space for n tokens on the way to
               every device: it would move just as much, and pack besides.

On one device, and where the experts are whole on every device, nothing is sent.

Dims: B rows and T positions that a device holds, D width, E experts (L of them on this device), K
experts that a token visits, N = B T tokens, A tokens of all ep devices, R rows that this device may
have to compute, G groups of S positions, C slots of a group at an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxpipe.models.transformer.routing import Routes, assign
from jaxpipe.parallel import axes

Axes = tuple[str, ...]


def in_slots(
  x_BTD: jax.Array,
  routes: Routes,
  group: int,
  capacity: int,
  over: Axes,
  experts: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """Returns the weighted sum of what each token's experts make of it, by slots of a capacity.

  Args:
    x_BTD: tokens, in the dtype of the experts.
    routes: the tokens' experts.
    group: S, contiguous positions that queue together; it divides T.
    capacity: C, slots of a group at an expert.
    over: mesh axes over which experts lie.
    experts: applies this device's L experts, [L, slots, D] -> [L, slots, D].

  Returns:
    [B, T, D] in the dtype of `x_BTD`; a choice that found no slot adds zero.
  """
  (B, T, D), E, K = x_BTD.shape, routes.logits_BTE.shape[-1], routes.chosen_BTK.shape[-1]
  G = B * T // group
  # The rows of Y are the slots of all groups on this device, those of Z the slots of all devices.
  slots = assign(routes.chosen_BTK.reshape(G, group, K), E, capacity)
  x_EYD = _rows(x_BTD.reshape(B * T, D), slots.token_EGC.reshape(E, G * capacity))
  x_LZD = checkpoint_name(axes.exchange(x_EYD, over, 0, 1), "experts_in")
  y_EYD = checkpoint_name(axes.exchange(experts(x_LZD), over, 1, 0), "experts_out")
  y_NKD = _rows(y_EYD.reshape(E * G * capacity, D), slots.slot_NK)
  weights_NK, wide = routes.weights_BTK.reshape(B * T, K), routes.weights_BTK.dtype
  y_ND = jnp.einsum("NKD,NK->ND", y_NKD.astype(wide), weights_NK)
  return y_ND.astype(x_BTD.dtype).reshape(B, T, D)


def dropless(
  x_BTD: jax.Array,
  routes: Routes,
  local: int,
  over: Axes,
  experts: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Returns the weighted sum of what each token's experts make of it, and drops no token.

      [1] Every device gets all A tokens and their routes.
      [2] It sorts the choices by its own experts; those of other devices' experts come last.
      [3] It applies its experts to the first R choices, the most that can be its own.
      [4] It adds the results up by token, and each device gets the sums of its tokens.

  Args:
    x_BTD: tokens, in the dtype of the experts.
    routes: the tokens' experts.
    local: L, experts on this device.
    over: mesh axes over which experts lie.
    experts: applies this device's L experts to rows sorted by expert: `(rows [R, D], sizes int32
      [L]) -> [R, D]`; rows behind the last expert's are zero and shall stay so.

  Returns:
    [B, T, D] in the dtype of `x_BTD`.
  """
  (B, T, D), K = x_BTD.shape, routes.chosen_BTK.shape[-1]
  # [1]
  x_AD = checkpoint_name(axes.gather(x_BTD.reshape(B * T, D), over, 0), "experts_in")
  chosen_AK = axes.gather(routes.chosen_BTK.reshape(B * T, K), over, 0)
  weights_AK = axes.gather(routes.weights_BTK.reshape(B * T, K), over, 0)

  # [2]: an expert's number on this device, or L for one that lies elsewhere, which sorts behind.
  expert_AK = chosen_AK.reshape(-1) - axes.index(over) * local
  expert_AK = jnp.where((expert_AK >= 0) & (expert_AK < local), expert_AK, local)
  R = len(x_AD) * min(K, local)  # a token visits no expert twice
  choice_R = jnp.argsort(expert_AK, stable=True)[:R]
  sizes_L = jnp.sum(expert_AK[:, None] == jnp.arange(local)[None, :], axis=0, dtype=jnp.int32)
  token_R = jnp.where(jnp.arange(R) < jnp.sum(sizes_L), choice_R // K, len(x_AD))

  y_RD = experts(_rows(x_AD, token_R), sizes_L)  # [3]
  y_RD = y_RD.astype(weights_AK.dtype) * weights_AK.reshape(-1)[choice_R][:, None]
  # [4]: a choice of another device's expert has token A, which `drop` leaves out.
  y_AD = jnp.zeros_like(x_AD, y_RD.dtype).at[token_R].add(y_RD, mode="drop")
  y_ND = axes.scatter(y_AD.astype(x_BTD.dtype), over, 0)
  return checkpoint_name(y_ND, "experts_out").reshape(B, T, D)


def ragged(sizes_L: jax.Array, x_RD: jax.Array, weights_LDF: jax.Array) -> jax.Array:
  """Multiplies rows that are sorted by expert with their expert's weights.

  Args:
    sizes_L: int32, number of rows of each of this device's experts.
    x_RD: the rows, first those of expert 0, then those of expert 1, and so on; rows behind the last
      expert's belong to none.
    weights_LDF: a matrix for each expert.

  Returns:
    [R, F]; zero for the rows that belong to no expert.
  """
  used_R1 = (jnp.arange(len(x_RD)) < jnp.sum(sizes_L))[:, None]

  # Kernels need not write rows that belong to no expert, here and in the derivatives: both sides
  # are masked, so that what lies there reaches neither a sum nor a gradient.
  def keep(rows: jax.Array) -> jax.Array:
    return jnp.where(used_R1, rows, jnp.zeros_like(rows))

  return keep(lax.ragged_dot(keep(x_RD), weights_LDF, sizes_L))


def _rows(table: jax.Array, index: jax.Array) -> jax.Array:
  """Rows of a table [rows, D] by index int [...]; zeros for an index beyond the last."""
  return table.at[index].get(mode="fill", fill_value=0)
