"""How a batch is cut into microbatches."""

from __future__ import annotations

from typing import Any

import jax

Tree = Any


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
  """Cuts every leaf `[B, ...]` into `[M, B/M, ...]`; raises as `check_rows` does."""
  rows = check_rows(batch, M, shards)
  return jax.tree.map(lambda leaf: leaf.reshape(M, rows, *leaf.shape[1:]), batch)
