"""Stages that live on several devices: which device owns the weights, and how the others get them.

Pipelines that run in two directions at once hold every stage twice. Each stage has one *owner*,
which stores its weights and updates them; the devices that hold it are its *homes*. Before the
first tick the owners send weights to the other homes (`gather`), and after the last tick the
gradients come back and are added (`reduce`):

    placement `mirrored`, P = 2, V = 2       owned by   gather             reduce
    device 0 holds stages 0, 1               0          stage 1 arrives    gradient of 1 leaves
    device 1 holds stages 1, 0               1          stage 0 arrives    gradient of 0 leaves

Together the two are the all-reduce of the papers (Chimera: Li and Hoefler, 2021, arXiv:2107.06925),
a half of it before the step and a half after. The optimizer then sees every weight once: norms and
clipping are those of the unpipelined model, and its state is not stored twice.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.parallel.protocol import PlacementLike

Tree = Any


@dataclasses.dataclass(frozen=True)
class Round:
  """One exchange in which every device sends at most one stage and receives at most one.

  That is what one `ppermute` can do: no device may stand twice on either side of its pairs.

  Attributes:
    pairs: (owner, other home), one for each stage that is sent.
    source: int32 [P], for each device that sends: which of the stages that it owns, counted in
      chunk order. 0 for a device that sends nothing.
    target: int32 [P], for each device that receives: the chunk as which it holds the stage. 0 for a
      device that receives nothing.
  """

  pairs: tuple[tuple[int, int], ...]
  source: np.ndarray
  target: np.ndarray


def owned(placement: PlacementLike) -> tuple[tuple[int, ...], ...]:
  """Gives each stage one owner among its homes, and each device equally many stages to own.

  Args:
    placement: which device holds which stage.

  Returns:
    For each of P devices, the S / P stages that it owns, in the order of the chunks that hold them.

  Raises:
    ValueError: devices cannot own equally many, so that nothing could be stored evenly.
  """
  P, S = placement.devices, placement.stages
  # Without replicas every stage's only home owns it.
  if not placement.replicated:
    return tuple(tuple(row) for row in placement.table)
  each = S // P
  rows: list[list[int]] = [[] for _ in range(P)]

  # Matching of stages to devices by augmenting paths.
  def give(stage: int, asked: set[int]) -> bool:
    """Finds an owner for the stage, moving stages that have one to other homes where that helps."""
    homes = [d for v in range(placement.chunks) for d in range(P) if placement.stage(d, v) == stage]
    for d in homes:
      # A device that could not help once cannot help later in the same search.
      if d not in asked:
        asked.add(d)
        moved = next((s for s in rows[d] if len(rows[d]) == each and give(s, asked)), None)
        if moved is not None:
          rows[d].remove(moved)
        if len(rows[d]) < each:
          rows[d].append(stage)
          return True
    return False

  # Chunk by chunk, so that of two mirrored pipelines the first owns.
  order = [placement.stage(d, v) for v in range(placement.chunks) for d in range(P)]
  if S % P or not all([give(stage, set()) for stage in dict.fromkeys(order)]):
    raise ValueError(
      f"{S} stages with replicas cannot be owned evenly by {P} devices: {list(map(list, rows))};"
      " use placement='mirrored', or stages that live on one device each"
    )
  return tuple(
    tuple(sorted(row, key=functools.partial(placement.chunk, d))) for d, row in enumerate(rows)
  )


def rounds(placement: PlacementLike) -> tuple[Round, ...]:
  """Returns the exchanges that bring every stage from its owner to its other homes, in order."""
  owners = owned(placement)
  owner = {stage: (d, i) for d, row in enumerate(owners) for i, stage in enumerate(row)}
  # (owner, number among the owner's stages, other home, chunk there)
  missing = [
    (*owner[placement.stage(d, v)], d, v)
    for v in range(placement.chunks)
    for d in range(placement.devices)
    if owner[placement.stage(d, v)][0] != d
  ]
  found = []
  while missing:
    # Greedily: each round takes every edge whose two devices are still free in it.
    now: list[tuple[int, int, int, int]] = []
    for edge in missing:
      if all(edge[0] != other[0] and edge[2] != other[2] for other in now):
        now.append(edge)
    missing = [edge for edge in missing if edge not in now]
    source, target = np.zeros((2, placement.devices), np.int32)
    for a, i, b, v in now:
      source[a], target[b] = i, v
    found.append(Round(tuple((a, b) for a, _, b, _ in now), source, target))
  return tuple(found)


def gather(tree: Tree, placement: PlacementLike, layers: int) -> Tree:
  """Returns all layers that a device holds, given those that it owns; inside `shard_map`.

  This gather is one of replicas: a `ppermute` for each round of `rounds`, from owner to other home.

  Args:
    tree: leaves [owned stages * layers, ...], this device's own.
    placement: which device holds which stage.
    layers: number of layers of a stage.

  Returns:
    Leaves [V * layers, ...], in chunk order; `tree` itself where no stage has replicas.
  """
  if not placement.replicated:
    return tree
  here = lax.axis_index(STAGE)
  own_chunks = _own_chunks(placement)[here]

  def leaf(own: jax.Array) -> jax.Array:
    stages = own.reshape(-1, layers, *own.shape[1:])
    held = jnp.zeros((placement.chunks, *stages.shape[1:]), own.dtype)
    held = held.at[own_chunks].set(stages)
    # `ppermute` waits for all devices: this is for before the first tick, outside of any branch.
    for one in rounds(placement):
      sent = lax.ppermute(stages[jnp.asarray(one.source)[here]], STAGE, one.pairs)
      receives = jnp.asarray([d in {b for _, b in one.pairs} for d in range(placement.devices)])
      chunk = jnp.asarray(one.target)[here]
      # A device outside of the pairs receives zeros: it must keep the chunk that it has.
      held = held.at[chunk].set(jnp.where(receives[here], sent, held[chunk]))
    return held.reshape(-1, *own.shape[1:])

  return jax.tree.map(leaf, tree)


def reduce(tree: Tree, placement: PlacementLike, layers: int) -> Tree:
  """Adds the gradients of all homes of a stage at its owner: the transpose of `gather`.

  Args:
    tree: leaves [V * layers, ...], gradients of all layers that this device holds.
    placement: which device holds which stage.
    layers: number of layers of a stage.

  Returns:
    Leaves [owned stages * layers, ...]; `tree` itself where no stage has replicas.
  """
  if not placement.replicated:
    return tree
  here = lax.axis_index(STAGE)
  own_chunks = _own_chunks(placement)[here]

  def leaf(held: jax.Array) -> jax.Array:
    stages = held.reshape(-1, layers, *held.shape[1:])
    own = stages[own_chunks]
    for one in rounds(placement):
      back = tuple((b, a) for a, b in one.pairs)
      sent = lax.ppermute(stages[jnp.asarray(one.target)[here]], STAGE, back)
      # A device that sent no weights in this round receives zeros now, which may be added.
      own = own.at[jnp.asarray(one.source)[here]].add(sent)
    return own.reshape(-1, *held.shape[1:])

  return jax.tree.map(leaf, tree)


def _own_chunks(placement: PlacementLike) -> jax.Array:
  """The chunks as which each device holds the stages that it owns, int32 [P, owned stages]."""
  rows = [[placement.chunk(d, s) for s in row] for d, row in enumerate(owned(placement))]
  return jnp.asarray(rows, jnp.int32)
