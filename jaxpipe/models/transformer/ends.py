"""Both ends of the transformer: the embedding of tokens, and the head with its cross-entropy.

Both have the methods that a schedule needs to cut their tables over the stages (see
`jaxpipe.Tables`): the embedding `ids` and `enter`, the head `features` and `targets`.

Dims: B batch rows, T positions (those of this device, S of the whole row), D model width, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxpipe.models.tables import make_table, table_logits
from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.cross_entropy import cross_entropy, look_up
from jaxpipe.models.transformer.dense import make_norm
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.sequence import check_divides, take_own
from jaxpipe.parallel.tensor import enter_tensor, leave_tensor, own_piece


class Stream(NamedTuple):
  """What layers with experts pass on; layers without experts pass on x alone.

  Attributes:
    x: [B, T, D], the residual stream.
    aux: [B], for every row the losses of the routers so far, float32 at least.
  """

  x: jax.Array
  aux: jax.Array


class Embed(nnx.Module):
  """The embedding: `batch["tokens"]` int [B, S] -> x [B, T, D], this device's positions."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.table = _table(config, config.vocabulary_size, rngs)
    if config.positions == "learned":
      self.positions = _table(config, config.max_positions, rngs)

  def __call__(self, batch: Any) -> jax.Array | Stream:
    pieces = axes.size(TENSOR) if self.config.positions_cut else 1
    check_divides(batch["tokens"].shape[1], axes.size(SEQUENCE), pieces)
    # The table may be cut over `tensor`: every device looks up its rows, and they are added.
    rows_BTD = look_up(self.table[...], self.ids(batch))
    return self.enter(leave_tensor(rows_BTD, self.config.positions_cut), batch)

  def ids(self, batch: Any) -> jax.Array:
    """Returns the rows of the table that this device's positions look up, int [B, T]."""
    return take_own(batch["tokens"])

  def enter(self, rows_BTD: jax.Array, batch: Any) -> jax.Array | Stream:
    """Makes x of the rows that were looked up.

    Args:
      rows_BTD: rows of the table.
      batch: the microbatch's inputs, of which the length of rows is read, and where there are any
        `segments` int [B, S], the document of each position.

    Returns:
      x [B, T, D] in the arithmetic's dtype, with learned positions added; in a model with experts,
      as a `Stream` whose losses are 0.
    """
    x_BTD = rows_BTD.astype(self.config.dtype)
    if self.config.positions == "learned":
      at = self._own_positions(batch["tokens"].shape[1], batch.get("segments"))
      x_BTD = x_BTD + at.astype(self.config.dtype)
    if not self.config.moe:
      return x_BTD
    return Stream(x_BTD, jnp.zeros(len(x_BTD), jnp.promote_types(x_BTD.dtype, jnp.float32)))

  def _own_positions(self, length: int, segments_BS: jax.Array | None) -> jax.Array:
    """Learned positions, [B or 1, T, D]: every device has the whole table of them.

    In rows of several documents they begin anew with each.
    """
    check_positions(self.config, length)
    at_1S = jnp.arange(length, dtype=jnp.int32)[None]
    at_BS = at_1S if segments_BS is None else places(segments_BS)
    at_TB = own_piece(take_own(at_BS).T, self.config.positions_cut)
    return jnp.take(self.positions[...], at_TB.T, axis=0)


def places(segments_BS: jax.Array) -> jax.Array:
  """Returns each position's place within its document, int32 [B, S].

  Args:
    segments_BS: int [B, S], the document of each position; documents are stretches of a row.
  """
  at_BS = jnp.broadcast_to(jnp.arange(segments_BS.shape[1], dtype=jnp.int32), segments_BS.shape)
  same_BS = segments_BS[:, 1:] == segments_BS[:, :-1]
  begins_BS = jnp.pad(jnp.where(same_BS, 0, at_BS[:, 1:]), ((0, 0), (1, 0)))
  return at_BS - lax.cummax(begins_BS, axis=1)


class Head(nnx.Module):
  """The head: x -> summed cross-entropy (nats), sum of the weights, metrics.

  Reads `batch["targets"]` int [B, S] and `batch["weights"]` float [B, S], 0 where there is padding.
  Metrics: `correct`, the weights of targets that had the largest logit; with experts also
  `router_loss`, which is part of the loss.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.norm = make_norm(config, rngs)
    self.config = config
    self.table = _table(config, config.vocabulary_size, rngs)

  def __call__(self, x: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    # The table goes in uncast: its gradient is summed over the chunks in its own precision.
    h_BTD, chunk = self.features(x, batch), self.config.logits_chunk
    sums = cross_entropy(h_BTD, self.table[...], *self.targets(batch), chunk)
    if not self.config.moe:
      return sums.loss, sums.weight, {"correct": sums.correct}
    aux = jnp.sum(x.aux).astype(sums.loss.dtype)
    return sums.loss + aux, sums.weight, {"correct": sums.correct, "router_loss": aux}

  def logits(self, x: Any) -> jax.Array:
    """Returns logits [B, T, V], float32 at least."""
    return table_logits(self.table[...].astype(self.config.dtype), self.features(x, None))

  def features(self, x: Any, batch: Any) -> jax.Array:
    """Returns what the table multiplies, [B, T, D] with all positions of `tensor`.

    Args:
      x: what the last layer returns.
      batch: not read.
    """
    h_BTD = self.norm(x.x if self.config.moe else x)
    if self.config.completep:
      h_BTD = h_BTD * self.config.completep.logits
    return enter_tensor(h_BTD, self.config.positions_cut)

  def targets(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns targets int [B, T] and their weights [B, T], of this device's positions."""
    return take_own(batch["targets"]), take_own(batch["weights"])


def check_positions(config: TransformerConfig, length: int) -> None:
  """Raises ValueError where rows of `length` tokens are longer than the learned positions."""
  if config.positions == "learned" and length > config.max_positions:
    raise ValueError(
      f"rows of {length} tokens, and {config.max_positions} learned positions; use rows of"
      f" {config.max_positions} or fewer, or more max_positions"
    )


def _table(config: TransformerConfig, rows: int, rngs: nnx.Rngs) -> nnx.Param:
  """A table [rows, D] of normal values of standard deviation 0.02."""
  return make_table(rows, config.width, 0.02, rngs, config.param_dtype)
