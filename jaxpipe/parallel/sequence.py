"""How the positions of a row lie over axis `sequence`, and how devices exchange them.

*Zig-zag.* Under a causal mask late positions see more than early ones, so a device with one
stretch of the row would multiply more or less than the others. The row is cut into 2c chunks of
positions for c devices, and device i holds chunks i and 2c-1-i: every device has the same share of
the scores (as users of ring attention do it; Striped Attention, arXiv 2311.09431, has the same
aim). With c = 4:

    chunk    0  1  2  3  4  5  6  7
    device   0  1  2  3  3  2  1  0

*Groups.* `ulysses` devices in a row form a group, whose devices can trade positions for heads
(DeepSpeed-Ulysses, arXiv 2309.14509). A group then holds, like a single device of a shorter axis,
an *early run* and a *late run* of positions: stretches g and 2r-1-g of 2r, for group g of
r = c / ulysses, each of `ulysses` chunks. (In other modules a chunk is a stage of a device, and a
run is neighbouring layers of one kind.) Without Ulysses a group is one device. With c = 4 and
ulysses = 2, `to_heads` does this:

    group 0   device 0   chunks 0, 7   all heads          chunks 0, 1, 6, 7   first half of heads
              device 1   chunks 1, 6   all heads    ->    chunks 0, 1, 6, 7   second half
    group 1   device 2   chunks 2, 5   all heads          chunks 2, 3, 4, 5   first half
              device 3   chunks 3, 4   all heads          chunks 2, 3, 4, 5   second half

*Tournament.* Ring attention needs the block (the keys and values of a group's positions) of every
other group once. Blocks do not go round a ring by `ppermute`, which waits for devices of other
stages and would dead-lock in a branch that only some stages take. Groups exchange blocks in pairs
instead, an all-gather of two each, in r - 1 rounds of a round-robin tournament. A group sends as
many blocks as in a ring. For r = 4:

    round 0   0-3   1-2
    round 1   0-2   1-3
    round 2   0-1   2-3

Dims: B batch rows, T positions of a device, S positions of a group, N heads, n heads of one device
of a group, H head width. In `check_divides`, `order` and `own_positions`, T are all positions of
the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR


def check_divides(T: int, c: int, tensor: int = 1) -> None:
  """Checks that a row of T positions can be cut over the mesh.

  Args:
    T: positions of a row.
    c: devices along `sequence`.
    tensor: devices along `tensor`, where activations are cut over it as well.

  Raises:
    ValueError: T is not a multiple of 2c (any T goes on one device), or T / c not one of `tensor`.
  """
  chunks = 2 * c if c > 1 else 1
  unit = math.lcm(chunks, c * tensor)
  if T % unit == 0 and T > 0:
    return
  below, above = T // unit * unit, (T // unit + 1) * unit
  near = f"{below} or {above}" if below > 0 else f"{above}"
  if T % chunks or T <= 0:
    raise ValueError(
      f"{T} positions cannot be cut into {chunks} chunks, two for each device of {SEQUENCE}:{c};"
      f" use a length of {near}"
    )
  raise ValueError(
    f"the {T // c} positions of a device ({T} over {SEQUENCE}:{c}) cannot be cut over"
    f" {TENSOR}:{tensor}; use a length of {near}"
  )


def order(T: int, c: int) -> np.ndarray:
  """Returns the global position at each place when the devices' pieces are joined in device order.

  `np.argsort` of it is the way back: `joined[:, np.argsort(order(T, c))]` is in natural order.

  Args:
    T: positions of a row.
    c: devices along `sequence`.

  Returns:
    int32 [T].

  Raises:
    ValueError: the row cannot be cut over so many devices.

  >>> order(8, 2).tolist()
  [0, 1, 6, 7, 2, 3, 4, 5]
  """
  check_divides(T, c)
  places = np.arange(T, dtype=np.int32)
  if c == 1:
    return places
  chunks = places.reshape(2 * c, -1)
  # Chunk i beside chunk 2c-1-i, for each device i.
  return np.stack([chunks[:c], chunks[: -1 - c : -1]], axis=1).reshape(T)


def own_positions(T: int) -> jax.Array:
  """Returns the global positions that this device holds of a row of T: int32 [T / c]."""
  return take_own(jnp.arange(T, dtype=jnp.int32), dim=0)


def take_own(x: jax.Array, dim: int = 1) -> jax.Array:
  """Takes this device's positions out of an array that has all of them along `dim`.

  Args:
    x: [..., T, ...].
    dim: the dim of positions.

  Returns:
    [..., T / c, ...], the early chunk before the late one.

  Raises:
    ValueError: T does not fit the axis.
  """
  check_divides(x.shape[dim], axes.size(SEQUENCE))
  # One device has the row in natural order, not as an early chunk and a late one.
  if axes.size(SEQUENCE) == 1:
    return x
  return jnp.concatenate(group_halves(x, 1, dim), axis=dim)


def groups(ulysses: int) -> int:
  """Returns r, the groups of `ulysses` devices along the axis; 1 where the axis has one device."""
  return max(1, axes.size(SEQUENCE) // ulysses)


def own_group(ulysses: int) -> jax.Array | int:
  """Returns the number of the group that this device belongs to, int32 [] in [0, r)."""
  return axes.index(SEQUENCE) // ulysses


def group_halves(
  x: jax.Array, ulysses: int, dim: int = 1, group: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Takes the early and the late run of a group out of an array that has all positions.

  Args:
    x: [..., T, ...].
    ulysses: devices of a group.
    dim: the dim of positions.
    group: int32 [], number of the group; by default this device's.

  Returns:
    Two of [..., T / 2r, ...] for r groups.
  """
  last = 2 * groups(ulysses) - 1
  run = x.shape[dim] // (last + 1)
  group = own_group(ulysses) if group is None else group
  early = lax.dynamic_slice_in_dim(x, group * run, run, dim)
  return early, lax.dynamic_slice_in_dim(x, (last - group) * run, run, dim)


def to_heads(x_BTNH: jax.Array, ulysses: int) -> jax.Array:
  """Trades heads for positions within the group (DeepSpeed-Ulysses, arXiv 2309.14509).

  Args:
    x_BTNH: this device's positions, all heads; `ulysses` divides N.
    ulysses: devices of a group.

  Returns:
    [B, S, n, H]: n = N / ulysses heads, and S = T * ulysses positions: the early run of the group,
    then the late one, each in natural order. With one group that is the whole row.
  """
  if ulysses == 1:
    return x_BTNH
  x_BSnH = _exchange(x_BTNH, ulysses, split=2, join=1)
  B, S, n, H = x_BSnH.shape
  # What arrives is one device after the other, each with an early chunk and a late one. Early
  # chunks are in order; the late chunks of later devices stand before those of earlier devices.
  x = x_BSnH.reshape(B, ulysses, 2, -1, n, H)
  early, late = x[:, :, 0], jnp.flip(x[:, :, 1], axis=1)
  return jnp.concatenate([early, late], axis=1).reshape(B, S, n, H)


def to_positions(x_BSnH: jax.Array, ulysses: int) -> jax.Array:
  """Trades positions for heads: the inverse of `to_heads`.

  Args:
    x_BSnH: the group's positions, this device's heads.
    ulysses: devices of a group.

  Returns:
    [B, T, N, H]: this device's positions, all heads.
  """
  if ulysses == 1:
    return x_BSnH
  B, S, n, H = x_BSnH.shape
  # The steps of `to_heads`, undone from the last to the first.
  early, late = jnp.split(x_BSnH.reshape(B, 2 * ulysses, -1, n, H), 2, axis=1)
  x = jnp.stack([early, jnp.flip(late, axis=1)], axis=2).reshape(B, S, n, H)
  return _exchange(x, ulysses, split=1, join=2)


def others(ulysses: int) -> list[jax.Array]:
  """Returns the numbers of the groups whose blocks `arriving` yields, in the same order.

  Args:
    ulysses: devices of a group.

  Returns:
    r - 1 numbers, int32 [] each: every group but this device's own, once.
  """
  r, own = groups(ulysses), own_group(ulysses)
  if r % 2:
    return [jnp.asarray((own + hop) % r) for hop in range(1, r)]
  return [jnp.asarray(partners)[own] for partners in tournament(r)]


def arriving(x: jax.Array, ulysses: int) -> Iterator[jax.Array]:
  """Yields the x of every other group, one by one, from the device with the same heads there.

  An even number of groups exchanges in pairs, one block at a time. An odd number cannot be cut into
  pairs, and JAX wants groups of one size: there one gather brings all blocks at once, which is
  as many bytes and more memory.

  Args:
    x: any shape.
    ulysses: devices of a group.

  Yields:
    An array of x's shape for each of `others`.
  """
  r, own = groups(ulysses), own_group(ulysses)
  if r % 2:
    blocks = _gather(x, [list(range(r))], ulysses) if r > 1 else x
    for other in others(ulysses):
      yield lax.dynamic_index_in_dim(blocks, other, keepdims=False)
    return
  for partners, other in zip(tournament(r), others(ulysses), strict=True):
    # A pair's gather returns both blocks, the lower group's first; one of them is this device's.
    pair = _gather(x, [[a, int(b)] for a, b in enumerate(partners) if a < b], ulysses)
    yield lax.dynamic_index_in_dim(pair, (other > own).astype(jnp.int32), keepdims=False)


def tournament(r: int) -> np.ndarray:
  """Returns the rounds of a round-robin tournament: in each, everyone has one partner.

  By the circle method: the last player stays where it is, and all others move on by one place after
  each round.

  Args:
    r: number of players, even.

  Returns:
    int32 [r - 1, r]: in each round, every player's partner.

  >>> tournament(4).tolist()
  [[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2]]
  """
  partners = np.empty((r - 1, r), np.int32)
  for turn in range(r - 1):
    for player in range(r - 1):
      partner = (2 * turn - player) % (r - 1)
      # Whoever would meet itself meets the last player.
      partners[turn, player] = r - 1 if partner == player else partner
    partners[turn, r - 1] = turn
  return partners


def _exchange(x: jax.Array, ulysses: int, split: int, join: int) -> jax.Array:
  """An all-to-all among the devices of each group, which are neighbours along the axis."""
  devices = np.arange(axes.size(SEQUENCE)).reshape(-1, ulysses).tolist()
  return lax.all_to_all(x, SEQUENCE, split, join, tiled=True, axis_index_groups=devices)


def _gather(x: jax.Array, among: list[list[int]], ulysses: int) -> jax.Array:
  """All-gathers x over sets of groups, from the devices at the same place in each.

  Args:
    x: any shape.
    among: sets of groups of one size; together all groups.
    ulysses: devices of a group.

  Returns:
    [groups of a set, *x.shape].
  """
  # Devices at the same place in their groups have the same heads.
  devices = [[g * ulysses + place for g in one] for one in among for place in range(ulysses)]
  return lax.all_gather(x, SEQUENCE, axis_index_groups=devices)
