"""What a device knows for the whole step: its program, its data, and its randomness."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpipe.pipeline.device.probe import Probe
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.layer.varying import vary
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.program import Program
from jaxpipe.stack.context import map_entries


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceContext:
  """Constants of one step on one device: table, batch, key, embedding and head.

  Everything is traced inside `shard_map`.

  Attributes:
    program: the tick table.
    axes: names of all mesh axes, over each of which everything here varies.
    poison: whether to fill with NaN what no action has written; for tests.
    blocking: whether a device that waits in a transfer works on nothing else, as CPUs do.
    probe: reads the clock round every action; None for a program that reads none.
    params: parameters outside the layers, `embed` and `head`, the head's with the leaves that are
      tied to the embedding; of a packed stack also `shared`, what several stages read.
    batch: the batch in microbatches, this device's rows of each, leaves `[M, rows, ...]`.
    key: PRNG key of the step for dropout, or None.
    rows: int32 [rows], the number of each of this device's rows within the whole microbatch.
    training: False where only forwards run.
    predicts: whether the last layer's outputs are wanted, and the head does not run.
    packed_state: model state of a packed stack, dtype -> [V, width]; empty where there is none.
    uniform_state: model state of a uniform stack as it is before the step, by its parts `embed`,
      `layers` and `head`, leaves of `layers` [V * layers, ...]; empty where there is none.
      Statistics are of `layers` alone; all else never changes.
    loss_scale: float32 [], a power of two by which `loss_sum` is multiplied before it is
      differentiated: the user's, times that of `layer/weight.py` where anything computes in
      float16; None where there is neither.
    x: stands for the activation that travels between stages; only its type is ever used, and it is
      None until `build.py` has found it.
  """

  program: Program
  axes: tuple[str, ...]
  poison: bool
  blocking: bool
  probe: Probe | None
  params: Tree
  batch: Tree
  key: jax.Array | None
  rows: jax.Array
  training: bool
  packed_state: Tree
  uniform_state: Tree
  predicts: bool = False
  loss_scale: jax.Array | None = None
  x: Tree = None

  def frozen_of(self, end: str) -> Tree:
    """Frozen variables of `embed` or `head` of a uniform stack; empty where there are none."""
    return self.uniform_state[end] if self.uniform_state else {}

  def microbatch(self, m: jax.Array) -> Tree:
    """A microbatch's own inputs, leaves `[rows, ...]`."""
    return map_entries(lambda leaf: rings.get(leaf, m), lambda entry: entry.value, self.batch)

  def vary(self, tree: Tree) -> Tree:
    """Marks every leaf as differing along all mesh axes."""
    return vary(tree, self.axes)

  def zeros(self, shapes: Tree) -> Tree:
    """Varying zeros of these shapes and dtypes."""
    return self.vary(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes))

  def idle(self, like: Sequence[Any]) -> list[jax.Array]:
    """What a device returns where it does nothing: zeros, or NaN under `poison`."""
    # Nobody reads it. NaN proves that in tests, for it would spread to every result that did.
    fill = jnp.nan if self.poison else 0

    def blank(leaf: Any) -> jax.Array:
      return jnp.full(leaf.shape, fill if is_float(leaf) else 0, leaf.dtype)

    leaves: list[jax.Array] = self.vary([blank(leaf) for leaf in like])
    return leaves

  def pools(
    self, shapes: Sequence[jax.ShapeDtypeStruct], lengths: Sequence[int], sums: int
  ) -> list[jax.Array]:
    """Pools of cells of undefined contents; the last `sums` of them begin at nothing.

    Args:
      shapes: of one cell of each pool.
      lengths: cells of each pool.
      sums: how many are added to by every F, and so need a defined start: zero, or the least whole
        number where the largest is kept.
    """
    first = len(shapes) - sums
    return [
      self.ring(shape, n) if i < first else self.vary(_nothing(shape, n))
      for i, (shape, n) in enumerate(zip(shapes, lengths, strict=True))
    ]

  def ring(self, shapes: Tree, slots: int) -> Tree:
    """A ring of `slots` slots of these shapes, its contents undefined, or NaN under `poison`."""
    return rings.allocate(shapes, slots, self.axes, self.poison)


def _nothing(shape: jax.ShapeDtypeStruct, length: int) -> jax.Array:
  """Cells at which sums begin: zeros, or the least whole number where the largest is kept."""
  start = 0 if is_float(shape) else jnp.iinfo(shape.dtype).min
  return jnp.full((length, *shape.shape), start, shape.dtype)
