"""Embedding and head taken apart at their tables, so that schedules can cut the tables over stages.

A table over a large vocabulary is the largest parameter of many language models, and only the first
and the last stage use it. A schedule with S and T passes therefore gives each of P devices a shard
of V / P rows. The two modules are then never called whole: the executor does what touches a table,
and the modules do the rest through the methods that `Tables` lists.

    batch -> ids -> [ table rows ] -> enter -> x ... x -> features -> [ logits, loss ] <- targets
             |-------- embedding --------|             |---------------- head ----------------|

What stands in brackets is done by all devices, each on its shard.

Letters of shapes: V tokens of the vocabulary, D width of the tables, P devices. `[...]` are the
dims of the ids or of the targets, such as rows and positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax

from jaxpipe.stack.errors import StackError
from jaxpipe.stack.module_spec import ModuleSpec, Tree, sums
from jaxpipe.stack.paths import get_path, merged


@dataclasses.dataclass(frozen=True)
class Tables:
  """Paths of the tables [V, D], and what the modules promise.

  Where the vocabulary is cut over the stages (`vocabulary=1` of a schedule), the modules are not
  called whole but by the parts that do not touch the table. For V, D and any number of targets:

      embed(batch)   == embed.enter(table[embed.ids(batch)], batch), ids from -V up to V-1
      head(x, batch) == (loss_sum, weight_sum, {"correct": ...}), with
          h [..., D] = head.features(x, batch)       logits [..., V] = h table'
          targets int [...], weights [...] = head.targets(batch)
          loss_sum = sum(weights * (logsumexp(logits) - logits[targets]))
          correct = sum(weights * (argmax(logits) == targets))

  `jaxpipe.check` compares them with the whole modules.

  Attributes:
    embed: path of the embedding's table in the embedding's variables, `/`-joined.
    head: path of the head's table in the head's variables, `/`-joined; the table may be tied to the
      embedding's. Either may be frozen.
  """

  embed: str
  head: str


@dataclasses.dataclass(frozen=True)
class VocabularyEnds:
  """An embedding and a head by their parts: their tables, and what they compute beside them.

  The parameters given to its methods are a module's, with its frozen variables. They may hold a
  shard of a table, [V / P, D], in place of the whole one: no method but the two that return a table
  reads it.

  Attributes:
    tables: where the tables lie in the variables.
    embed: the embedding, which has the methods `ids` and `enter`.
    head: the head, which has the methods `features` and `targets`.
    ties: path of a head's variable that the embedding owns -> its path in the embedding's.
  """

  tables: Tables
  embed: ModuleSpec
  head: ModuleSpec
  ties: Mapping[str, str]

  def check_tables(self) -> None:
    """Checks that both paths lead to tables of as many rows, tied to each other or to nothing.

    Raises:
      StackError: one of them is no table, they have unlike numbers of rows, or a table is tied to
        a parameter that is none.
    """
    embed = self.embed_table(merged(self.embed.shapes, self.embed.state))
    head = self.head_table(merged(self.head.shapes, self.head.state))
    if any(getattr(table, "ndim", None) != 2 for table in (embed, head)):
      raise StackError(
        f"vocabulary: embed {self.tables.embed} is {embed}, head {self.tables.head} is {head}; both"
        " must be tables [V, D]"
      )
    if embed.shape[0] != head.shape[0]:
      raise StackError(
        f"vocabulary: the embedding has {embed.shape[0]} rows, the head {head.shape[0]};"
        " both must have one for every token"
      )
    # Were a table tied to anything else, that parameter would be cut although it is read whole, or
    # the table be whole although the executor reads a shard.
    for theirs, ours in self.ties.items():
      if (theirs == self.tables.head) != (ours == self.tables.embed):
        raise StackError(
          f"vocabulary: head {theirs} is tied to embed {ours}, and the tables are embed"
          f" {self.tables.embed} and head {self.tables.head}; a table can be tied to the other"
          " table only"
        )

  def cut_over(self, devices: int) -> frozenset[str]:
    """Checks that the tables can be cut over P devices, and returns where they lie in the tree.

    Args:
      devices: P, of which each is to hold V / P rows of every table.

    Returns:
      Paths in the stack's own tree, such as `embed/table`; one path where the head's table is the
      embedding's.

    Raises:
      StackError: a module lacks a method that `Tables` lists, or P does not divide V.
    """
    self.embed.require("ids", "enter")
    self.head.require("features", "targets")
    V = self.head_table(merged(self.head.shapes, self.head.state)).shape[0]
    if V % devices:
      near = V - V % devices
      raise StackError(
        f"a vocabulary of {V} tokens cannot be cut over {devices} devices; use {near + devices}"
        f" (tokens that never occur do no harm), or {near}"
      )
    # A tied table exists once, in the embedding.
    tied = {f"head/{theirs}" for theirs in self.ties}
    return frozenset({f"embed/{self.tables.embed}"} | ({f"head/{self.tables.head}"} - tied))

  def check_metrics(self, params: Tree, frozen: Tree, x: Tree, batch: Tree) -> None:
    """Checks that the head returns no metric that the shards of its table cannot give.

    Args:
      params: all parameters that the head reads; only shapes and dtypes matter here.
      frozen: its frozen variables.
      x: what the last layer returns.
      batch: the microbatch's own inputs, leaves `[rows, ...]`.

    Raises:
      StackError: the head has other metrics than `correct`.
    """

    def metrics_of(params: Tree, frozen: Tree, x: Tree, batch: Tree) -> Tree:
      return sums(self.head.run(params, frozen, True, x, batch)[0])[1][1]

    metrics = jax.eval_shape(metrics_of, params, frozen, x, batch)
    if not isinstance(metrics, Mapping) or set(metrics) != {"correct"}:
      named = ", ".join(sorted(metrics)) if isinstance(metrics, Mapping) else str(type(metrics))
      raise StackError(
        f"head returns metrics {named}, and a vocabulary cut over the stages gives only correct;"
        " return only that, or use a schedule whose last stage holds the whole head"
      )

  def embed_table(self, params: Tree) -> jax.Array:
    """The embedding's table [V, D], or a shard of it, out of the embedding's parameters."""
    table: jax.Array = get_path(params, self.tables.embed)
    return table

  def trains_embed_table(self) -> bool:
    """Whether the embedding's table has a gradient."""
    return get_path(self.embed.shapes, self.tables.embed) is not None

  def trains_head_table(self) -> bool:
    """Whether the head's table has a gradient."""
    return get_path(self.head.shapes, self.tables.head) is not None

  def head_table(self, params: Tree) -> jax.Array:
    """The head's table [V, D], or a shard of it, out of all parameters that the head reads."""
    table: jax.Array = get_path(params, self.tables.head)
    return table

  def ids(self, params: Tree, batch: Tree) -> jax.Array:
    """Which rows of the embedding's table a microbatch looks up: int [...], from -V up to V - 1."""
    ids: jax.Array = self.embed.call("ids", params, batch)
    return ids

  def enter(self, params: Tree, rows: jax.Array, batch: Tree) -> Tree:
    """The embedding's output x, made of the rows [..., D] that were looked up."""
    return self.embed.call("enter", params, rows, batch)

  def features(self, params: Tree, x: Tree, batch: Tree) -> jax.Array:
    """The features [..., D] of the last x, which times the head's table are the logits [..., V]."""
    features: jax.Array = self.head.call("features", params, x, batch)
    return features

  def targets(self, params: Tree, batch: Tree) -> tuple[jax.Array, jax.Array]:
    """The targets of a microbatch, int [...], and the weight of each in the loss, [...]."""
    targets, weights = self.head.call("targets", params, batch)
    return targets, weights
