"""Checks and prepares what a step is called with: the batch, as microbatches, and the model state.

A batch has leaves `[B, ...]`. Microbatch m is the rows m*B/M ... (m+1)*B/M, and each of D data
shards holds an equal slice of every microbatch:

    rows            [B, ...]        0 ........................... B-1
    microbatches    [M, B/M, ...]   m = 0      | m = 1      | ...
    on one device   [M, B/M/D, ...] a D-th of each
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from jaxpipe.parallel.mesh import ROWS
from jaxpipe.pipeline.storage import rings
from jaxpipe.stack.context import Filled, Whole, check_leaves, leaves_of_rows, map_entries
from jaxpipe.stack.protocol import LaidOutStack

Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Microbatches:
  """A batch that is divided into microbatches already, so that each process can load its own rows.

  To divide `[B, ...]` inside the program moves rows between devices. It also needs a whole
  `[B, ...]` to begin with, of which no process of several has all rows.

  Attributes:
    leaves: tree of arrays `[M, B/M, ...]`, sharded by `rows_spec`.
  """

  leaves: Tree


def rows_spec(mesh: Mesh) -> Spec:
  """Returns the partition spec of the leaves `[M, B/M, ...]` of `Microbatches`.

  The second dim is cut over all mesh axes that rows lie over and that have more than one device, so
  that each device holds an equal slice of every microbatch.
  """
  shape = dict(mesh.shape)
  return Spec(None, tuple(axis for axis in ROWS if shape.get(axis, 1) > 1) or None)


def check_rows(batch: Tree, M: int, shards: int = 1) -> int:
  """Returns B / M, the number of rows of a microbatch over all data shards.

  Args:
    batch: arrays or their shapes, leaves `[B, ...]`.
    M: number of microbatches.
    shards: number of data shards, each of which holds an equal slice of every microbatch.

  Raises:
    ValueError: a batch without rows, leaves with different numbers of rows, or a B that
      `M * shards` does not divide.
  """
  check_leaves(batch)
  rows = {}  # number of rows -> a leaf that has so many, as the message names it
  for path, leaf in leaves_of_rows(batch):
    rows[leaf.shape[0]] = f"batch{jax.tree_util.keystr(path)} has {leaf.shape[0]}"
  if len(rows) != 1:
    raise ValueError(
      f"{' rows but '.join(rows.values()) or 'no leaf of the batch has rows'}; use one B for"
      " all that have rows, and jaxpipe.Whole(array) for an entry that has none"
    )
  (B,) = rows
  if B == 0 or B % (M * shards):
    raise ValueError(
      f"a batch of {B} rows cannot be cut into {M} microbatches over {shards} data shards;"
      f" use a multiple of {M * shards} rows, the last of them with weight 0 where there are fewer"
    )
  return B // M


def microbatches(batch: Tree, M: int, shards: int) -> Tree:
  """Returns the batch with leaves `[M, B/M, ...]`.

  Args:
    batch: arrays, leaves `[B, ...]`; or `Microbatches`, whose leaves are returned as they are.
    M: number of microbatches.
    shards: number of data shards, each of which holds an equal slice of every microbatch.

  Raises:
    ValueError: as `check_rows` does, or `Microbatches` of another number.
  """
  if isinstance(batch, Microbatches):
    return _check_cut(batch.leaves, M, shards)
  rows = check_rows(batch, M, shards)
  return map_entries(lambda leaf: leaf.reshape(M, rows, *leaf.shape[1:]), _wrapped, batch)


def _wrapped(entry: Any) -> Whole:
  """An entry without rows, which is no part of any microbatch alone."""
  return entry if isinstance(entry, Whole) else Whole(jnp.asarray(entry))


def microbatch(divided: Tree, m: Any) -> Tree:
  """Returns one microbatch's own inputs, leaves `[B/M, ...]`, of what `microbatches` returns."""
  return map_entries(lambda leaf: rings.get(leaf, m), lambda entry: entry.value, divided)


def batch_specs(divided: Tree, mesh: Mesh) -> Tree:
  """Returns the partition specs of what `microbatches` returns; what is whole is not cut."""
  rows = rows_spec(mesh)
  return map_entries(lambda leaf: rows, lambda entry: Whole(Spec()), divided)


def filled_up(batch: Tree, M: int, shards: int) -> Tree:
  """Returns a batch of a number of rows that can be divided: the last row is repeated.

  Args:
    batch: arrays, leaves `[B, ...]`; or `Microbatches`, which are divided already.
    M: number of microbatches.
    shards: number of data shards.

  Returns:
    The batch itself where it needs nothing; else `Filled`, with leaves of the next multiple of
    `M * shards` rows.
  """
  shapes = {jnp.shape(leaf)[:1] for _, leaf in leaves_of_rows(batch)}
  # What is no batch of B rows `check_rows` refuses, by name.
  if isinstance(batch, Microbatches) or len(shapes) != 1 or (0,) in shapes:
    return batch
  ((B,),) = shapes
  more = -B % (M * shards)
  if not more:
    return batch

  def fill(leaf: Any) -> Any:
    # Copies of a row that counts are as finite as it is. NumPy arrays stay what they are: each
    # process of several has the whole of them.
    arrays: Any = jnp if isinstance(leaf, jax.Array) else np
    return arrays.concatenate([leaf, arrays.repeat(leaf[-1:], more, axis=0)])

  return Filled(map_entries(fill, lambda entry: entry, batch), np.arange(B + more) < B)


def check_dtypes(batch: Tree, example: Tree) -> None:
  """Refuses a batch with leaves of other dtypes than the example had that all was made for.

  Args:
    batch: arrays; entries that only one of the two has are not compared.
    example: arrays or their shapes.

  Raises:
    ValueError: names the leaf and both dtypes.
  """
  want = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(example)}
  for path, leaf in jax.tree.leaves_with_path(batch):
    name = jax.tree_util.keystr(path)
    if name not in want or not hasattr(leaf, "dtype"):
      continue
    # As JAX takes them: without double precision, float64 is float32.
    got, made_for = (jax.dtypes.canonicalize_dtype(one.dtype) for one in (leaf, want[name]))
    if got != made_for:
      raise ValueError(
        f"batch{name} is {got}, and the example batch had {made_for} there; cast it, or call"
        " jaxpipe.pipeline with an example of this dtype"
      )


def given_state(stack: LaidOutStack, state: Tree | None) -> Tree:
  """Returns the model state that a step is called with, or an empty dict if the stack has none.

  Args:
    stack: of the step.
    state: fourth argument of the step: a tree of the model state, or None.

  Raises:
    ValueError: a stack with state is called without one, or a stack without state with one; or an
      array, such as a key, is passed in the state's place.
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


def look_at_draws(stack: LaidOutStack, batch: Tree) -> None:
  """Traces a stack that no `init` has traced, so that its layers' draws are told apart by shape.

  A run that is resumed begins so; without this its masks might be others than before.

  Args:
    stack: of the step.
    batch: what the step is called with.
  """
  cut = isinstance(batch, Microbatches)
  rows = batch.leaves if cut else batch.batch if isinstance(batch, Filled) else batch

  def shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[cut:], jnp.result_type(leaf))

  stack.network.look(map_entries(shape, lambda entry: entry, rows), stack.uniform)


def _check_cut(leaves: Tree, M: int, shards: int) -> Tree:
  """Returns the leaves of `Microbatches`, if they are M microbatches of equally many rows."""
  for path, leaf in leaves_of_rows(leaves):
    if leaf.ndim < 2 or leaf.shape[0] != M:
      raise ValueError(
        f"microbatches{jax.tree_util.keystr(path)} is {leaf.shape}; the schedule has M={M}, and"
        " every leaf is [M, B/M, ...]"
      )
  # Without the leading dim, each microbatch is a batch that is divided over the data shards alone.
  check_rows(
    map_entries(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), lambda entry: entry, leaves
    ),
    1,
    shards,
  )
  return map_entries(lambda leaf: leaf, _wrapped, leaves)
