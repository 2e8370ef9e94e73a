"""Stages that live on several devices: who owns the weights, and how the others get them.

Pipelines that run in two directions at once hold every stage twice. Every stage has one owner,
which stores its weights and updates them; before the first tick the owners send them to the other
homes, and after the last the gradients come back and are added. That is the all-reduce of the
papers (Chimera: Li and Hoefler, 2021, arXiv:2107.06925), cut in two round the step: the optimizer
sees every weight once, norms and clipping are those of the unpipelined model, and its state is not
stored twice.
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

Tree = Any


@dataclasses.dataclass(frozen=True)
class Round:
  """One exchange in which every device sends at most one stage and receives at most one.

  Attributes:
    pairs: (owner, other home).
    source: int32 [P], place of the stage among those that the owner owns.
    target: int32 [P], chunk that the receiver holds it as.
  """

  pairs: tuple[tuple[int, int], ...]
  source: np.ndarray
  target: np.ndarray


def owned(placement: Any) -> tuple[tuple[int, ...], ...]:
  """Returns the stages that each device owns, in chunk order; every stage has one owner.

  Raises:
    ValueError: devices cannot own equally many, so that nothing could be stored evenly.
  """
  P, S = placement.devices, placement.stages
  if not placement.replicated:
    return tuple(tuple(row) for row in placement.table)
  each = S // P
  rows: list[list[int]] = [[] for _ in range(P)]

  def give(stage: int, asked: set[int]) -> bool:
    """Finds the stage an owner, moving stages that have one to other homes where that helps."""
    homes = [d for v in range(placement.chunks) for d in range(P) if placement.stage(d, v) == stage]
    for d in homes:
      if d not in asked:
        asked.add(d)
        moved = next((s for s in rows[d] if len(rows[d]) == each and give(s, asked)), None)
        if moved is not None:
          rows[d].remove(moved)
        if len(rows[d]) < each:
          rows[d].append(stage)
          return True
    return False

  # Chunk by chunk: of two mirrored pipelines, the first owns.
  order = [placement.stage(d, v) for v in range(placement.chunks) for d in range(P)]
  if S % P or not all([give(stage, set()) for stage in dict.fromkeys(order)]):
    raise ValueError(
      f"{S} stages with replicas cannot be owned evenly by {P} devices: {list(map(list, rows))};"
      " use placement='mirrored', or stages that live on one device each"
    )
  # In the order of the chunks that hold them.
  return tuple(
    tuple(sorted(row, key=functools.partial(placement.chunk, d))) for d, row in enumerate(rows)
  )


def rounds(placement: Any) -> tuple[Round, ...]:
  """The exchanges that bring every stage from its owner to its other homes."""
  owners = owned(placement)
  owner = {stage: (d, i) for d, row in enumerate(owners) for i, stage in enumerate(row)}
  missing = [
    (*owner[placement.stage(d, v)], d, v)
    for v in range(placement.chunks)
    for d in range(placement.devices)
    if owner[placement.stage(d, v)][0] != d
  ]
  found = []
  while missing:
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


def gather(tree: Tree, placement: Any, layers: int) -> Tree:
  """Returns all layers that a device holds, given those that it owns.

  Args:
    tree: leaves [owned stages * layers, ...], inside `shard_map`.
    placement: which device holds which stage.
    layers: layers of a stage.

  Returns:
    Leaves [V * layers, ...], in chunk order; `tree` itself where no stage has replicas.
  """
  if not placement.replicated:
    return tree
  here = lax.axis_index(STAGE)
  own = _own_chunks(placement)[here]

  def leaf(mine: jax.Array) -> jax.Array:
    stages = mine.reshape(-1, layers, *mine.shape[1:])
    held = jnp.zeros((placement.chunks, *stages.shape[1:]), mine.dtype)
    held = held.at[own].set(stages)
    for one in rounds(placement):
      sent = lax.ppermute(stages[jnp.asarray(one.source)[here]], STAGE, one.pairs)
      receives = jnp.asarray([d in {b for _, b in one.pairs} for d in range(placement.devices)])
      chunk = jnp.asarray(one.target)[here]
      held = held.at[chunk].set(jnp.where(receives[here], sent, held[chunk]))
    return held.reshape(-1, *mine.shape[1:])

  return jax.tree.map(leaf, tree)


def reduce(tree: Tree, placement: Any, layers: int) -> Tree:
  """Transpose of `gather`: adds the gradients of all homes of a stage, at its owner."""
  if not placement.replicated:
    return tree
  here = lax.axis_index(STAGE)
  own = _own_chunks(placement)[here]

  def leaf(held: jax.Array) -> jax.Array:
    stages = held.reshape(-1, layers, *held.shape[1:])
    mine = stages[own]
    for one in rounds(placement):
      back = tuple((b, a) for a, b in one.pairs)
      sent = lax.ppermute(stages[jnp.asarray(one.target)[here]], STAGE, back)
      # Who sent nothing before receives zeros now.
      mine = mine.at[jnp.asarray(one.source)[here]].add(sent)
    return mine.reshape(-1, *held.shape[1:])

  return jax.tree.map(leaf, tree)


def _own_chunks(placement: Any) -> jax.Array:
  """Chunks that each device holds the stages as that it owns, int32 [P, owned]."""
  rows = [[placement.chunk(d, s) for s in row] for d, row in enumerate(owned(placement))]
  return jnp.asarray(rows, jnp.int32)
