"""Embedding and head with their tables cut over the stages, a shard of V / P rows on every device.

Devices then hold equally many parameters, and no stage is the slowest for having the head
(vocabulary parallelism, Yeung et al., 2024, arXiv:2411.05288). Four points of a microbatch's way
are collectives over the stage axis, which all devices enter on the same tick; between them stand
the actions S and T, which every device runs on its own shard:

    [1] embedding           the sum over shards of the rows that each finds is the first stage's x
    [2] output              the last stage's y is sent to every shard of the head
        S                   each shard: its logits, and their sums
    [3] barrier             all S of a microbatch are done: loss, and dy for the last stage
        T                   each shard: the gradient of its part of the head's table
    [4] embedding gradient  the first stage's dx is sent to every shard, which adds its rows'
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.device import sharded_cross_entropy as cross_entropy
from jaxpipe.pipeline.device.carry import Carry, Totals, accumulate, count
from jaxpipe.pipeline.device.context import DeviceContext
from jaxpipe.pipeline.device.now import Now
from jaxpipe.pipeline.device.protocols import Leaves
from jaxpipe.pipeline.device.sharded_cross_entropy import Targets, first_row
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.layer.trace import lenient
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.stage_collectives import BARRIER, EMBEDDING, EMBEDDING_GRADIENT, OUTPUT
from jaxpipe.schedules import Kind
from jaxpipe.stack.paths import merged
from jaxpipe.stack.vocabulary import VocabularyEnds


@dataclasses.dataclass(frozen=True)
class ShardedEnds:
  """Both ends, a shard of each on every device; `Ends` describes the methods.

  Attributes:
    context: the device.
    modules: embedding and head in parts, as functions of their parameters.
  """

  context: DeviceContext
  modules: VocabularyEnds

  def held(self) -> dict[str, Tree]:
    """Shapes of one slot of the ring `vocabulary`, by name.

    `y` is the last stage's output; `m`, `s`, `target`, `best`, `e` and `a` are what S leaves for
    the barrier and for T, see `Score`; `scale` is what the barrier leaves for T.

    Raises:
      StackError: the head has metrics beside `correct`; shards cannot give them.
    """
    context = self.context
    args = context.params["head"], context.frozen_of("head"), context.x
    self.modules.check_metrics(*args, context.microbatch(jnp.int32(0)))
    y = jax.tree.leaves(self.context.x)
    score = jax.eval_shape(self._score, y, jnp.int32(0))
    backward = {"scale": score["m"]} if self.context.training else {}
    return {"y": y, **score, **backward}

  def heaviest(self) -> Any:
    """The jaxpr of S, which holds the logits of a shard."""
    return jax.make_jaxpr(self._score)(jax.tree.leaves(self.context.x), jnp.int32(0)).jaxpr

  def enter(self, carry: Carry, now: Now) -> Carry:
    """[1] Before F of a first stage: its input, the sum of what every shard finds."""
    context, ring = self.context, carry.activations

    def embed(column: str, m: jax.Array, ring: Tree) -> Tree:
      batch = context.microbatch(m)
      x = lenient(self.modules.enter)(self._all("embed"), self._look_up(batch), batch)
      return rings.store(ring, jax.tree.leaves(context.vary(x)), now.column(column, "slot"))

    for column in context.program.collectives.of(EMBEDDING):
      ring = now.collective(column, embed, ring)
    return carry._replace(activations=ring)

  def input(self, carry: Carry, now: Now) -> Leaves:
    """The stage's input: it lies in the ring at the first stage, too, where `enter` has put it."""
    leaves: Leaves = rings.load(carry.activations, now.activations)
    return leaves

  def leave(self, carry: Carry, now: Now, y: Leaves) -> Carry:
    """[2] After F of a last stage: its output to every shard of the head."""
    ring = carry.vocabulary["y"]

    def send(column: str, m: jax.Array, ring: Tree) -> Tree:
      return rings.store(ring, self._from_home(y, now, column), now.column(column, "slot"))

    for column in self.context.program.collectives.of(OUTPUT):
      ring = now.collective(column, send, ring)
    return carry._replace(vocabulary={**carry.vocabulary, "y": ring})

  def back_at_input(self, carry: Carry, now: Now, dx: Leaves) -> Carry:
    """[4] After B or I of a first stage: the embedding's gradient, each shard its own rows."""
    context, grads = self.context, carry.grads["embed"]

    def run(column: str, m: jax.Array, grads: Tree) -> Tree:
      batch, params = context.microbatch(m), context.params["embed"]
      sent = self._from_home(dx, now, column)
      # Looked up a second time: the rows of the first are not kept from F to here.
      rows = self._look_up(batch)
      args = params, context.frozen_of("embed"), rows, batch, sent
      dp, drows = lenient(self._enter_gradient)(*args)
      if not self.modules.trains_embed_table():
        return accumulate(grads, _once(dp))
      row, inside = self._rows_of(batch)
      table = self.modules.embed_table(params)
      dtable = jnp.zeros_like(table).at[row].add(jnp.where(inside[..., None], drows, 0))
      back = jax.vjp(self.modules.embed_table, params)[1]
      return accumulate(accumulate(grads, _once(dp)), back(dtable)[0])

    for column in context.program.collectives.of(EMBEDDING_GRADIENT):
      grads = now.collective(column, run, grads)
    return carry._replace(grads={**carry.grads, "embed": grads})

  def passes(self, carry: Carry, now: Now) -> Carry:
    """S, then [3] where this tick has the last S of a microbatch, then T."""
    ring = carry.vocabulary
    # S reads y and leaves the others: what its conditional returns must not be what it reads.
    made = {name: ring[name] for name in ring if name not in ("y", "scale")}

    def run(made: Tree) -> Tree:
      y = rings.load(ring["y"], now.vocabulary)
      return rings.store(made, self._score(y, now.microbatch), now.vocabulary)

    made = now.when([Kind.S], run, lambda same: same, made)
    carry = carry._replace(vocabulary={**ring, **made})
    for column in self.context.program.collectives.of(BARRIER):
      carry = (self._train if self.context.training else self._evaluate)(carry, now, column)
    return self._weight_grad(carry, now) if self.context.training else carry

  def _evaluate(self, carry: Carry, now: Now, column: str) -> Carry:
    """[3] where only forwards run: the loss of a microbatch."""

    def run(column: str, m: jax.Array, totals: Totals) -> Totals:
      held = rings.load(carry.vocabulary, now.column(column, "slot"))
      return self._count(totals, held, m)[0]

    return carry._replace(totals=now.collective(column, run, carry.totals))

  def _train(self, carry: Carry, now: Now, column: str) -> Carry:
    """[3] in training: the loss, dy into the ring `gradients`, and the scale that T wants."""
    context, ring = self.context, carry.vocabulary

    def run(
      column: str, m: jax.Array, totals: Totals, grads: Tree, gradients: Tree, scales: Tree
    ) -> Any:
      slot = now.column(column, "slot")
      batch = context.microbatch(m)
      held = rings.load(ring, slot)
      totals, lse = self._count(totals, held, m)
      scale = jnp.exp(held["m"] - lse)
      table = self.modules.head_table(self._all("head"))
      dh = context.vary(cross_entropy.dh(held["a"], scale, table, self._targets(m)))
      args = context.params["head"], context.frozen_of("head"), held["y"], batch, dh
      dp, dy = lenient(self._features_gradient)(*args)
      gradients = rings.store(gradients, dy, now.column(column, "gradient"))
      return totals, accumulate(grads, _once(dp)), gradients, rings.store(scales, scale, slot)

    totals, grads, gradients, scales = now.collective(
      column, run, carry.totals, carry.grads["head"], carry.gradients, ring["scale"]
    )
    return carry._replace(
      totals=totals,
      gradients=gradients,
      grads={**carry.grads, "head": grads},
      vocabulary={**ring, "scale": scales},
    )

  def _weight_grad(self, carry: Carry, now: Now) -> Carry:
    """T: the gradient of this device's shard of the head's table; nothing where it is frozen."""
    params = self.context.params["head"]
    if not self.modules.trains_head_table():
      return carry

    def run(grads: Tree) -> Tree:
      held = rings.load(carry.vocabulary, now.vocabulary)
      h = self._features(held["y"], now.microbatch)
      targets = self._targets(now.microbatch)
      table = cross_entropy.dtable(held["e"], held["scale"], h, targets)
      back = jax.vjp(self.modules.head_table, params)[1]
      return accumulate(grads, back(table.astype(self.modules.head_table(params).dtype))[0])

    grads = now.when([Kind.T], run, lambda same: same, carry.grads["head"])
    return carry._replace(grads={**carry.grads, "head": grads})

  def _count(self, totals: Totals, held: Tree, m: jax.Array) -> tuple[Totals, jax.Array]:
    """Adds a microbatch's loss and metrics on one device.

    Args:
      totals: this device's sums.
      held: what S has left for microbatch m.
      m: the microbatch.

    Returns:
      The sums, and the log-sum-exp of every token, [N].
    """
    lse, target, best = cross_entropy.join(*(held[name] for name in ("m", "s", "target", "best")))
    params = self._all("head")
    targets, weights = self.modules.targets(params, self.context.microbatch(m))
    rows = lax.axis_size(STAGE) * len(self.modules.head_table(params))
    target = cross_entropy.known(target, targets, weights, rows)
    weight = weights.reshape(-1).astype(lse.dtype)
    loss = jnp.sum((lse - target) * weight)
    right = jnp.sum((best == targets.reshape(-1)) * weight)
    sums = self.context.vary((loss, (jnp.sum(weight), {"correct": right})))
    return count(totals, *_once(sums)), self.context.vary(lse)

  def _score(self, y: Leaves, m: jax.Array) -> dict[str, jax.Array]:
    """S: this shard's share of the softmax for output y of microbatch m; fields of `Score`.

    Evaluation needs no gradient, and so neither `e` nor `a`.
    """
    h, params = self._features(y, m), self._all("head")
    score = cross_entropy.score(h, self.modules.head_table(params), self._targets(m))
    unused = () if self.context.training else ("e", "a")
    # In place of a Score with None: every leaf of this dict becomes a ring.
    return {name: part for name, part in score._asdict().items() if name not in unused}

  def _features(self, y: Leaves, m: jax.Array) -> jax.Array:
    """The head's features, [N, D], which its table multiplies."""
    x = jax.tree.unflatten(jax.tree.structure(self.context.x), y)
    batch = self.context.microbatch(m)
    h = lenient(self.modules.features)(self._all("head"), x, batch)
    return h.reshape(-1, h.shape[-1])

  def _features_gradient(
    self, params: Tree, frozen: Tree, y: Leaves, batch: Tree, dh: jax.Array
  ) -> tuple[Tree, Leaves]:
    """Gradients of the head's own parameters and of y, given that of the features, [N, D]."""

    def features(params: Tree, floats: Leaves) -> jax.Array:
      x = jax.tree.unflatten(jax.tree.structure(self.context.x), y)
      return self.modules.features(merged(params, frozen), with_float_leaves(x, floats), batch)

    h, back = jax.vjp(features, params, float_leaves(y))
    dp, dy = back(dh.reshape(h.shape).astype(h.dtype))
    return dp, dy

  def _enter_gradient(
    self, params: Tree, frozen: Tree, rows: jax.Array, batch: Tree, dx: Leaves
  ) -> tuple[Tree, jax.Array]:
    """Gradients of the embedding's own parameters and of the rows that it was given."""

    def enter(params: Tree, rows: jax.Array) -> Leaves:
      return float_leaves(self.modules.enter(merged(params, frozen), rows, batch))

    dp, drows = jax.vjp(enter, params, rows)[1](dx)
    return dp, drows

  def _targets(self, m: jax.Array) -> Targets:
    """Where the targets of microbatch m lie in this shard of the head's table."""
    params = self._all("head")
    targets, weights = self.modules.targets(params, self.context.microbatch(m))
    # Gradients alone read these weights; `_count` asks for its own.
    if self.context.loss_scale is not None:
      weights = weights * self.context.loss_scale
    return cross_entropy.find(targets, weights, len(self.modules.head_table(params)))

  def _rows_of(self, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """Rows within this shard that the microbatch looks up, and whether each lies in it."""
    params = self._all("embed")
    rows = len(self.modules.embed_table(params))
    ids = lenient(self.modules.ids)(params, batch)
    # Below zero they count from the end, as in the whole table.
    row = jnp.where(ids < 0, ids + lax.axis_size(STAGE) * rows, ids) - first_row(rows)
    inside = (row >= 0) & (row < rows)
    return jnp.where(inside, row, 0), inside

  def _look_up(self, batch: Tree) -> jax.Array:
    """Sums over all shards the rows that each finds: rows of the whole table, [..., D]."""
    row, inside = self._rows_of(batch)
    table = self.modules.embed_table(self._all("embed"))
    rows = lax.psum(jnp.where(inside[..., None], table[row], 0), STAGE)
    looked_up: jax.Array = self.context.vary(rows)
    return looked_up

  def _all(self, end: str) -> Tree:
    """All variables of `embed` or `head`, those that are frozen among them."""
    return merged(self.context.params[end], self.context.frozen_of(end))

  def _from_home(self, leaves: Leaves, now: Now, column: str) -> Leaves:
    """Sends leaves to all devices from the one that has them, its `home` in the table.

    A sum over devices in which all others add zeros: one collective that all of them enter alike.
    """
    home = now.column(column, "home") > 0
    sent = [lax.psum(jnp.where(home, leaf, jnp.zeros_like(leaf)), STAGE) for leaf in leaves]
    here: Leaves = self.context.vary(sent)
    return here


def _once(tree: Tree) -> Tree:
  """Zeros on all devices but the first, of values that all have computed alike.

  They are summed over the devices at the end of the step, and would count P times.
  """
  first = lax.axis_index(STAGE) == 0
  return jax.tree.map(lambda leaf: jnp.where(first, leaf, jnp.zeros_like(leaf)), tree)
