"""Embedding and head with their tables cut over the stages, a shard of V / P rows on every device.

The lookup of the embedding is the sum over the shards of what each finds, and its gradient is added
where the row lies. The head is an action of its own on every device: S before its barrier, T after
(see `cross_entropy`). All devices then hold equally many parameters, and no stage is the slowest
for having the head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.parallel.mesh import STAGE
from jaxpipe.pipeline.device import sharded_cross_entropy as cross_entropy
from jaxpipe.pipeline.device.context import Carry, DeviceContext, Now, Totals, accumulate
from jaxpipe.pipeline.device.sharded_cross_entropy import Targets, first_row
from jaxpipe.pipeline.device.whole_ends import Leaves, count
from jaxpipe.pipeline.layer.equations import lenient
from jaxpipe.pipeline.layer.floats import float_leaves, with_float_leaves
from jaxpipe.pipeline.storage import rings
from jaxpipe.pipeline.storage.rings import Tree
from jaxpipe.pipeline.table.meetings import BARRIER, EMBEDDING, EMBEDDING_GRADIENT, OUTPUT
from jaxpipe.schedules import Kind


@dataclasses.dataclass(frozen=True)
class ShardedEnds:
  """Both ends, a shard of each on every device.

  Attributes:
    local: the device.
  """

  local: DeviceContext

  def held(self) -> dict[str, Tree]:
    """Shapes of a slot of the ring `vocabulary`: y, and what S leaves for its barrier and T.

    Raises:
      StackError: the head has metrics beside `correct`; shards cannot give them.
    """
    local = self.local
    args = local.params["head"], local.x, local.microbatch(jnp.int32(0))
    local.stack.check_shared_metrics(*args)
    y = jax.tree.leaves(self.local.x)
    score = jax.eval_shape(self._score, y, jnp.int32(0))
    backward = {"scale": score["m"]} if self.local.training else {}
    return {"y": y, **score, **backward}

  def heaviest(self) -> Any:
    """The jaxpr of what holds most at once: S, with the logits of its shard."""
    return jax.make_jaxpr(self._score)(jax.tree.leaves(self.local.x), jnp.int32(0)).jaxpr

  def enter(self, state: Carry, now: Now) -> Carry:
    """Before F of a first stage: its input, to which every shard adds what it finds."""
    local, ring = self.local, state.activations

    def embed(column: str, m: jax.Array, ring: Tree) -> Tree:
      batch = local.microbatch(m)
      x = lenient(local.stack.enter)(local.params["embed"], self._look_up(batch), batch)
      return rings.store(ring, jax.tree.leaves(local.vary(x)), now.column(column, "slot"))

    for column in local.program.meetings.of(EMBEDDING):
      ring = now.meet(column, embed, ring)
    return state._replace(activations=ring)

  def input(self, state: Carry, now: Now) -> Leaves:
    """The stage's input; at the first stage, too, it has arrived."""
    leaves: Leaves = rings.load(state.activations, now.activations)
    return leaves

  def leave(self, state: Carry, now: Now, y: Leaves) -> Carry:
    """After F of a last stage: y to every shard of the head."""
    ring = state.vocabulary["y"]

    def send(column: str, m: jax.Array, ring: Tree) -> Tree:
      return rings.store(ring, self._from_home(y, now, column), now.column(column, "slot"))

    for column in self.local.program.meetings.of(OUTPUT):
      ring = now.meet(column, send, ring)
    return state._replace(vocabulary={**state.vocabulary, "y": ring})

  def back_at_input(self, state: Carry, now: Now, dx: Leaves) -> Carry:
    """After B or I of a first stage: the embedding's gradient, each shard its own rows."""
    local, grads = self.local, state.grads["embed"]

    def run(column: str, m: jax.Array, grads: Tree) -> Tree:
      batch, params = local.microbatch(m), local.params["embed"]
      sent = self._from_home(dx, now, column)
      rows = self._look_up(batch)
      dp, drows = lenient(self._enter_gradient)(params, rows, batch, sent)
      row, inside = self._rows_of(batch)
      table = local.stack.embed_table(params)
      dtable = jnp.zeros_like(table).at[row].add(jnp.where(inside[..., None], drows, 0))
      back = jax.vjp(local.stack.embed_table, params)[1]
      return accumulate(accumulate(grads, _once(dp)), back(dtable)[0])

    for column in local.program.meetings.of(EMBEDDING_GRADIENT):
      grads = now.meet(column, run, grads)
    return state._replace(grads={**state.grads, "embed": grads})

  def passes(self, state: Carry, now: Now) -> Carry:
    """S and T, and what follows the last S of a microbatch."""
    ring = state.vocabulary
    made = {name: ring[name] for name in ring if name not in ("y", "scale")}

    def run(made: Tree) -> Tree:
      y = rings.load(ring["y"], now.vocabulary)
      return rings.store(made, self._score(y, now.microbatch), now.vocabulary)

    made = now.when([Kind.S], run, lambda same: same, made)
    state = state._replace(vocabulary={**ring, **made})
    for column in self.local.program.meetings.of(BARRIER):
      state = (self._train if self.local.training else self._evaluate)(state, now, column)
    return self._weight_grad(state, now) if self.local.training else state

  def _evaluate(self, state: Carry, now: Now, column: str) -> Carry:
    """The barrier, where only forwards run: the loss."""

    def run(column: str, m: jax.Array, totals: Totals) -> Totals:
      held = rings.load(state.vocabulary, now.column(column, "slot"))
      return self._count(totals, held, m)[0]

    return state._replace(totals=now.meet(column, run, state.totals))

  def _train(self, state: Carry, now: Now, column: str) -> Carry:
    """The barrier: the loss, dy into `gradients`, and the scale that T wants."""
    local, ring = self.local, state.vocabulary

    def run(
      column: str, m: jax.Array, totals: Totals, grads: Tree, gradients: Tree, scales: Tree
    ) -> Any:
      slot, params, batch = now.column(column, "slot"), local.params["head"], local.microbatch(m)
      held = rings.load(ring, slot)
      totals, lse = self._count(totals, held, m)
      scale = jnp.exp(held["m"] - lse)
      table = local.stack.head_table(params)
      dh = local.vary(cross_entropy.dh(held["a"], scale, table, self._targets(m)))
      dp, dy = lenient(self._features_gradient)(params, held["y"], batch, dh)
      gradients = rings.store(gradients, dy, now.column(column, "gradient"))
      return totals, accumulate(grads, _once(dp)), gradients, rings.store(scales, scale, slot)

    totals, grads, gradients, scales = now.meet(
      column, run, state.totals, state.grads["head"], state.gradients, ring["scale"]
    )
    return state._replace(
      totals=totals,
      gradients=gradients,
      grads={**state.grads, "head": grads},
      vocabulary={**ring, "scale": scales},
    )

  def _weight_grad(self, state: Carry, now: Now) -> Carry:
    """T: the gradient of the shard of the head's table."""
    stack, params = self.local.stack, self.local.params["head"]

    def run(grads: Tree) -> Tree:
      held = rings.load(state.vocabulary, now.vocabulary)
      h = self._features(held["y"], now.microbatch)
      targets = self._targets(now.microbatch)
      table = cross_entropy.dtable(held["e"], held["scale"], h, targets)
      back = jax.vjp(stack.head_table, params)[1]
      return accumulate(grads, back(table.astype(stack.head_table(params).dtype))[0])

    grads = now.when([Kind.T], run, lambda same: same, state.grads["head"])
    return state._replace(grads={**state.grads, "head": grads})

  def _count(self, totals: Totals, held: Tree, m: jax.Array) -> tuple[Totals, jax.Array]:
    """Adds a microbatch's loss, on one device; returns the log-sum-exps, [N], as well."""
    lse, target, best = cross_entropy.join(*(held[name] for name in ("m", "s", "target", "best")))
    params = self.local.params["head"]
    targets, weights = self.local.stack.targets(params, self.local.microbatch(m))
    rows = lax.axis_size(STAGE) * len(self.local.stack.head_table(params))
    target = cross_entropy.known(target, targets, weights, rows)
    weight = weights.reshape(-1).astype(lse.dtype)
    loss = jnp.sum((lse - target) * weight)
    right = jnp.sum((best == targets.reshape(-1)) * weight)
    sums = self.local.vary((loss, (jnp.sum(weight), {"correct": right})))
    return count(totals, *_once(sums)), self.local.vary(lse)

  def _score(self, y: Leaves, m: jax.Array) -> dict[str, jax.Array]:
    """What S leaves, by name."""
    h, params = self._features(y, m), self.local.params["head"]
    score = cross_entropy.score(h, self.local.stack.head_table(params), self._targets(m))
    unused = () if self.local.training else ("e", "a")
    return {name: part for name, part in score._asdict().items() if name not in unused}

  def _features(self, y: Leaves, m: jax.Array) -> jax.Array:
    """What the head's table multiplies, [N, D]."""
    x = jax.tree.unflatten(jax.tree.structure(self.local.x), y)
    batch = self.local.microbatch(m)
    h = lenient(self.local.stack.features)(self.local.params["head"], x, batch)
    return h.reshape(-1, h.shape[-1])

  def _features_gradient(
    self, params: Tree, y: Leaves, batch: Tree, dh: jax.Array
  ) -> tuple[Tree, Leaves]:
    def features(params: Tree, floats: Leaves) -> jax.Array:
      x = jax.tree.unflatten(jax.tree.structure(self.local.x), y)
      return self.local.stack.features(params, with_float_leaves(x, floats), batch)

    h, back = jax.vjp(features, params, float_leaves(y))
    dp, dy = back(dh.reshape(h.shape).astype(h.dtype))
    return dp, dy

  def _enter_gradient(
    self, params: Tree, rows: jax.Array, batch: Tree, dx: Leaves
  ) -> tuple[Tree, jax.Array]:
    def enter(params: Tree, rows: jax.Array) -> Leaves:
      return float_leaves(self.local.stack.enter(params, rows, batch))

    dp, drows = jax.vjp(enter, params, rows)[1](dx)
    return dp, drows

  def _targets(self, m: jax.Array) -> Targets:
    stack, params = self.local.stack, self.local.params["head"]
    targets, weights = stack.targets(params, self.local.microbatch(m))
    return cross_entropy.find(targets, weights, len(stack.head_table(params)))

  def _rows_of(self, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """Rows of this shard that the microbatch looks up, and which of them lie here."""
    params = self.local.params["embed"]
    rows = len(self.local.stack.embed_table(params))
    ids = lenient(self.local.stack.ids)(params, batch)
    # Below zero they count from the end, as in the whole table.
    row = jnp.where(ids < 0, ids + lax.axis_size(STAGE) * rows, ids) - first_row(rows)
    inside = (row >= 0) & (row < rows)
    return jnp.where(inside, row, 0), inside

  def _look_up(self, batch: Tree) -> jax.Array:
    """All devices meet: rows of the whole table, [..., D]."""
    row, inside = self._rows_of(batch)
    table = self.local.stack.embed_table(self.local.params["embed"])
    rows = lax.psum(jnp.where(inside[..., None], table[row], 0), STAGE)
    looked_up: jax.Array = self.local.vary(rows)
    return looked_up

  def _from_home(self, leaves: Leaves, now: Now, column: str) -> Leaves:
    """All devices meet: what the one of them has that is the microbatch's home."""
    home = now.column(column, "home") > 0
    sent = [lax.psum(jnp.where(home, leaf, jnp.zeros_like(leaf)), STAGE) for leaf in leaves]
    here: Leaves = self.local.vary(sent)
    return here


def _once(tree: Tree) -> Tree:
  """What all devices have computed alike, counted on one of them."""
  first = lax.axis_index(STAGE) == 0
  return jax.tree.map(lambda leaf: jnp.where(first, leaf, jnp.zeros_like(leaf)), tree)
