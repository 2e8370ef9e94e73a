"""How the positions of a row lie over axis `sequence`, and how its devices show them to each other.

Under a causal mask late positions see more than early ones, so a device with a run of neighbours
would work more or less than the others. The row is cut into 2c chunks for c devices, and device i
holds chunks i and 2c-1-i: every device has the same share of the scores (the zig-zag of ring
attention's users; Striped Attention, arXiv 2311.09431, has the same aim). With c = 4:

    chunk    0  1  2  3  4  5  6  7
    device   0  1  2  3  3  2  1  0

`ulysses` devices in a row (a group) can trade positions for heads. A group then holds, like a
single device of a shorter axis, an early run and a late run of positions: chunks g and 2r-1-g of
2r, for group g of r = c / ulysses. What follows speaks of groups; without Ulysses a group is one
device.

Blocks go from group to group in pairwise exchanges, not by `ppermute`, which waits for devices of
other stages. Every group meets every other once, as in a tournament, so the bytes are a ring's.

Dims: B batch rows, T positions of a device, S positions of a group, N heads, n heads of one device
of a group, H head width.
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
  """Says whether a row of T positions can be cut over the mesh.

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
  """The global position at each place when the devices' pieces are joined in device order.

  `np.argsort` of it is the way back: `joined[:, np.argsort(order(T, c))]` is in natural order.

  Args:
    T: positions of a row.
    c: devices along `sequence`.

  Returns:
    int32 [T].

  >>> order(8, 2).tolist()
  [0, 1, 6, 7, 2, 3, 4, 5]
  """
  check_divides(T, c)
  places = np.arange(T, dtype=np.int32)
  if c == 1:
    return places
  chunks = places.reshape(2 * c, -1)
  return np.stack([chunks[:c], chunks[: -1 - c : -1]], axis=1).reshape(T)


def own_positions(T: int) -> jax.Array:
  """Global positions of what this device holds of a row of T: int32 [T / c]."""
  return take_own(jnp.arange(T, dtype=jnp.int32), dim=0)


def take_own(x: jax.Array, dim: int = 1) -> jax.Array:
  """This device's positions of an array that has all of them along `dim`.

  Args:
    x: [..., T, ...].
    dim: the dim of positions.

  Returns:
    [..., T / c, ...], the early chunk before the late one.

  Raises:
    ValueError: T does not fit the axis.
  """
  check_divides(x.shape[dim], axes.size(SEQUENCE))
  if axes.size(SEQUENCE) == 1:
    return x
  return jnp.concatenate(group_halves(x, 1, dim), axis=dim)


def groups(ulysses: int) -> int:
  """Groups of `ulysses` devices along the axis; one where the axis has a single device."""
  return max(1, axes.size(SEQUENCE) // ulysses)


def own_group(ulysses: int) -> jax.Array | int:
  """The group of this device, int32 []."""
  return axes.index(SEQUENCE) // ulysses


def group_halves(
  x: jax.Array, ulysses: int, dim: int = 1, group: jax.Array | int | None = None
) -> tuple[jax.Array, jax.Array]:
  """The early and the late run of positions of a group, of an array that has all T along `dim`.

  Args:
    x: [..., T, ...].
    ulysses: devices of a group.
    dim: the dim of positions.
    group: int32 []; by default this device's.

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
  # A device after the other, each with an early and a late chunk; the late ones stand backwards.
  x = x_BSnH.reshape(B, ulysses, 2, -1, n, H)
  early, late = x[:, :, 0], jnp.flip(x[:, :, 1], axis=1)
  return jnp.concatenate([early, late], axis=1).reshape(B, S, n, H)


def to_positions(x_BSnH: jax.Array, ulysses: int) -> jax.Array:
  """The way back from `to_heads`: [B, S, n, H] -> [B, T, N, H]."""
  if ulysses == 1:
    return x_BSnH
  B, S, n, H = x_BSnH.shape
  early, late = jnp.split(x_BSnH.reshape(B, 2 * ulysses, -1, n, H), 2, axis=1)
  x = jnp.stack([early, jnp.flip(late, axis=1)], axis=2).reshape(B, S, n, H)
  return _exchange(x, ulysses, split=1, join=2)


def others(ulysses: int) -> list[jax.Array]:
  """The groups whose blocks arrive here, int32 [] each, in the order of `arriving`."""
  r, own = groups(ulysses), own_group(ulysses)
  if r % 2:
    return [jnp.asarray((own + hop) % r) for hop in range(1, r)]
  return [jnp.asarray(partners)[own] for partners in tournament(r)]


def arriving(x: jax.Array, ulysses: int) -> Iterator[jax.Array]:
  """What the devices of the other groups with the same heads have in place of x, one by one.

  An even number of groups exchanges in pairs, one block at a time. An odd number cannot be cut into
  pairs, and JAX wants groups of one size: there one gather brings all blocks at once, which is
  as many bytes and more memory.

  Args:
    x: any shape.
    ulysses: devices of a group.

  Yields:
    The x of each of `others`.
  """
  r, own = groups(ulysses), own_group(ulysses)
  if r % 2:
    blocks = _gather(x, [list(range(r))], ulysses) if r > 1 else x
    for other in others(ulysses):
      yield lax.dynamic_index_in_dim(blocks, other, keepdims=False)
    return
  for partners, other in zip(tournament(r), others(ulysses), strict=True):
    pair = _gather(x, [[a, int(b)] for a, b in enumerate(partners) if a < b], ulysses)
    yield lax.dynamic_index_in_dim(pair, (other > own).astype(jnp.int32), keepdims=False)


def tournament(r: int) -> np.ndarray:
  """Who meets whom, for r (even) players: the circle method, in which the last one sits still.

  Returns:
    int32 [r - 1, r]: in each round, everyone's partner.

  >>> tournament(4).tolist()
  [[3, 2, 1, 0], [2, 3, 0, 1], [1, 0, 3, 2]]
  """
  partners = np.empty((r - 1, r), np.int32)
  for turn in range(r - 1):
    for player in range(r - 1):
      partner = (2 * turn - player) % (r - 1)
      partners[turn, player] = r - 1 if partner == player else partner
    partners[turn, r - 1] = turn
  return partners


def _exchange(x: jax.Array, ulysses: int, split: int, join: int) -> jax.Array:
  """All to all among the devices of each group."""
  devices = np.arange(axes.size(SEQUENCE)).reshape(-1, ulysses).tolist()
  return lax.all_to_all(x, SEQUENCE, split, join, tiled=True, axis_index_groups=devices)


def _gather(x: jax.Array, among: list[list[int]], ulysses: int) -> jax.Array:
  """Gathers x over sets of groups, from the devices at the same place: [groups of a set, ...]."""
  devices = [[g * ulysses + place for g in one] for one in among for place in range(ulysses)]
  return lax.all_gather(x, SEQUENCE, axis_index_groups=devices)
