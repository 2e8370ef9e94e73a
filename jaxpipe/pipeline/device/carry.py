"""What a device carries from tick to tick: rings and pools, gradient sums, and sums of the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxpipe.pipeline.storage.pools import Pools
from jaxpipe.pipeline.storage.rings import Tree, wide


class Totals(NamedTuple):
  """Sums over the microbatches whose loss this device has computed.

  Attributes:
    loss: scalar, sum of the head's `loss_sum`.
    weight: scalar, sum of its `weight`, by which loss and gradients are divided after the last
      tick.
    metrics: the head's metrics, each a sum.
  """

  loss: jax.Array
  weight: jax.Array
  metrics: Tree


class Carry(NamedTuple):
  """The carry of the loop over ticks.

  Attributes:
    activations: ring of stage inputs that have arrived, leaves `[slots, ...]`.
    gradients: ring of cotangents of stage outputs that have arrived or that the head has left; the
      float leaves alone.
    pools: saved values, which one action leaves for a later one; of a packed stack behind them the
      sums over microbatches of what F makes of the model state.
    weights: ring of the weights that G has gathered, leaf by leaf; empty where all weights are
      gathered before the first tick or lie whole.
    vocabulary: ring of what a shard of the head keeps between its passes S and T, by name; empty
      where the last stage has the whole head.
    flight: what was sent on the tick before and has not arrived yet; None without slack.
    grads: gradient sums in float32 at least: `embed`, `layers`, `head`, and of a packed stack
      `shared`, weights that several stages read. Empty in evaluation.
    totals: sums of loss, weight and metrics.
    outputs: where a prediction runs, the last layer's output of each microbatch, leaves
      `[M + 1, rows, ...]`, of which the last slot is for what nobody wants; None elsewhere.
  """

  activations: Tree
  gradients: Tree
  pools: Pools
  weights: list[jax.Array]
  vocabulary: dict[str, Tree]
  flight: Tree | None
  grads: dict[str, Tree]
  totals: Totals
  outputs: Tree | None = None


def accumulate(sums: Tree, new: Tree) -> Tree:
  """Adds leaf by leaf, in the sums' own precision."""
  # Sums are float32 at least, whatever the model computes in: M microbatches of bfloat16 gradients
  # would lose what each adds.
  return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new)


def count(totals: Totals, loss: jax.Array, aux: tuple[jax.Array, Tree]) -> Totals:
  """Adds one microbatch's `loss_sum, (weight, metrics)`, as heads return them."""
  return Totals(*accumulate(tuple(totals), (loss, *aux)))


def sum_type(leaf: Any) -> jax.ShapeDtypeStruct:
  """Shape and dtype in which a leaf is summed: float32 at least, int32 for counts."""
  return jax.ShapeDtypeStruct(leaf.shape, wide(leaf.dtype))
