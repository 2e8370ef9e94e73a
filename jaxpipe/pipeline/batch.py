"""What a step is given: a batch, cut into microbatches, and the state of a stack that has some."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import ROWS

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatches:
  """A batch that is cut already, so that it can be made where it will lie.

  Cutting `[B, ...]` inside the program moves rows between devices, and first of all asks for a
  `[B, ...]` that lies somewhere: no process has all rows.

  Attributes:
    leaves: arrays `[M, B/M, ...]`, sharded by `rows_spec`.
  """

  leaves: Tree


def rows_spec(mesh: Mesh) -> Spec:
  """How the leaves of `Microbatches` lie: `[M, B/M, ...]`, an equal slice of every microbatch."""
  shape = dict(mesh.shape)
  return Spec(None, tuple(axis for axis in ROWS if shape.get(axis, 1) > 1) or None)


def check_rows(batch: Tree, M: int, shards: int = 1) -> int:
  """Returns B / M, the rows of a microbatch over all data shards.

  Args:
    batch: arrays or their shapes, leaves `[B, ...]`.
    M: microbatches.
    shards: data shards, each of which holds an equal slice of every microbatch.

  Raises:
    ValueError: leaves without rows or with different numbers of them, or a B that does not divide.
  """
  rows = {}
  for path, leaf in jax.tree.leaves_with_path(batch):
    if not leaf.shape:
      raise ValueError(f"batch{jax.tree_util.keystr(path)} is a scalar; every leaf is [B, ...]")
    rows[leaf.shape[0]] = f"batch{jax.tree_util.keystr(path)} has {leaf.shape[0]}"
  if len(rows) != 1:
    raise ValueError(f"{' rows but '.join(rows.values()) or 'an empty batch'}; use one B for all")
  (B,) = rows
  if B == 0 or B % (M * shards):
    raise ValueError(
      f"a batch of {B} rows cannot be cut into {M} microbatches over {shards} data shards;"
      f" use a multiple of {M * shards} rows"
    )
  return B // M


def microbatches(batch: Tree, M: int, shards: int) -> Tree:
  """Cuts every leaf `[B, ...]` into `[M, B/M, ...]`; what is cut already stays as it is.

  Args:
    batch: arrays, leaves `[B, ...]`; or `Microbatches`.
    M, shards: as for `check_rows`.

  Raises:
    ValueError: as `check_rows` does, or it was cut into another number of microbatches.
  """
  if isinstance(batch, Microbatches):
    return _check_cut(batch.leaves, M, shards)
  rows = check_rows(batch, M, shards)
  return jax.tree.map(lambda leaf: leaf.reshape(M, rows, *leaf.shape[1:]), batch)


def given_state(stack: Any, state: Tree | None) -> Tree:
  """The state that a step is called with, if the stack has any.

  Raises:
    ValueError: a stack with state is called without, or one without with.
  """
  if isinstance(state, jax.Array):
    raise ValueError("the state is an array, such as a key; call step(params, batch, key, state)")
  if stack.has_state and not state:
    raise ValueError(
      "the stack has state (running statistics or frozen weights): call step(params, batch, key,"
      " state) or evaluate(params, batch, state); it comes from pipe.init_state(key, batch), or"
      " stack.init_state(key, batch, schedule, mesh)"
    )
  if state and not stack.has_state and jax.tree.leaves(state):
    raise ValueError("the stack has no state, and the step was given some; leave it out")
  return state if stack.has_state else {}


def _check_cut(leaves: Tree, M: int, shards: int) -> Tree:
  for path, leaf in jax.tree.leaves_with_path(leaves):
    if leaf.ndim < 2 or leaf.shape[0] != M:
      raise ValueError(
        f"microbatches{jax.tree_util.keystr(path)} is {leaf.shape}; the schedule has M={M}, and"
        " every leaf is [M, B/M, ...]"
      )
  check_rows(
    jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), leaves), 1, shards
  )
  return leaves
