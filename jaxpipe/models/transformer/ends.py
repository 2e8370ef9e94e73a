"""Both ends of the transformer: what is looked up for tokens, and what is lost on their targets.

Dims: B batch rows, T positions (those of this device, S of the whole row), D model width, V
vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxpipe.models.transformer.config import TransformerConfig
from jaxpipe.models.transformer.cross_entropy import cross_entropy, look_up
from jaxpipe.models.transformer.dense import make_norm
from jaxpipe.parallel import axes
from jaxpipe.parallel.mesh import SEQUENCE, TENSOR
from jaxpipe.parallel.sequence import check_divides, own_positions, take_own
from jaxpipe.parallel.tensor import enter_tensor, leave_tensor, own_piece


class Stream(NamedTuple):
  """What layers with experts pass on: x [B, T, D], and losses of its routers for every row [B]."""

  x: jax.Array
  aux: jax.Array


class Embed(nnx.Module):
  """`batch["tokens"]` int [B, S] -> x [B, T, D], this device's positions."""

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.config = config
    self.table = _table(config, config.vocabulary_size, rngs)
    if config.positions == "learned":
      self.positions = _table(config, config.max_positions, rngs)

  def __call__(self, batch: Any) -> jax.Array | Stream:
    pieces = axes.size(TENSOR) if self.config.positions_cut else 1
    check_divides(batch["tokens"].shape[1], axes.size(SEQUENCE), pieces)
    rows_BTD = look_up(self.table[...], self.ids(batch))
    return self.enter(leave_tensor(rows_BTD, self.config.positions_cut), batch)

  def ids(self, batch: Any) -> jax.Array:
    """Rows of the table, [B, T]."""
    return take_own(batch["tokens"])

  def enter(self, rows_BTD: jax.Array, batch: Any) -> jax.Array | Stream:
    """x, of the rows that were looked up."""
    x_BTD = rows_BTD.astype(self.config.dtype)
    if self.config.positions == "learned":
      x_BTD = x_BTD + self._own_positions(batch["tokens"].shape[1])
    if not self.config.moe:
      return x_BTD
    return Stream(x_BTD, jnp.zeros(len(x_BTD), jnp.promote_types(x_BTD.dtype, jnp.float32)))

  def _own_positions(self, length: int) -> jax.Array:
    """Learned positions, [1, T, D]: every device has the whole table."""
    check_positions(self.config, length)
    at_T = own_piece(own_positions(length), self.config.positions_cut)
    return jnp.take(self.positions[...], at_T, axis=0)[None].astype(self.config.dtype)


class Head(nnx.Module):
  """x -> summed cross-entropy (nats), number of targets, metrics.

  Reads `batch["targets"]` int [B, S] and `batch["weights"]` float [B, S], 0 where there is padding.
  """

  def __init__(self, config: TransformerConfig, rngs: nnx.Rngs):
    self.norm = make_norm(config, rngs)
    self.config = config
    self.table = _table(config, config.vocabulary_size, rngs)

  def __call__(self, x: Any, batch: Any) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    # The table as it is: its gradient is summed over the chunks in its own precision.
    h_BTD, chunk = self.features(x, batch), self.config.logits_chunk
    sums = cross_entropy(h_BTD, self.table[...], *self.targets(batch), chunk)
    if not self.config.moe:
      return sums.loss, sums.weight, {"correct": sums.correct}
    aux = jnp.sum(x.aux).astype(sums.loss.dtype)
    return sums.loss + aux, sums.weight, {"correct": sums.correct, "router_loss": aux}

  def logits(self, x: Any) -> jax.Array:
    """Returns logits [B, T, V], float32 at least."""
    table_VD = self.table[...].astype(self.config.dtype)
    wide = jnp.promote_types(self.config.dtype, jnp.float32)
    return jnp.einsum("BTD,VD->BTV", self.features(x, None), table_VD, preferred_element_type=wide)

  def features(self, x: Any, batch: Any) -> jax.Array:
    """What the table multiplies, [B, T, D]."""
    h_BTD = self.norm(x.x if self.config.moe else x)
    if self.config.completep:
      h_BTD = h_BTD * self.config.completep.logits
    return enter_tensor(h_BTD, self.config.positions_cut)

  def targets(self, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Targets int [B, T] and their weights [B, T], of this device's positions."""
    return take_own(batch["targets"]), take_own(batch["weights"])


def check_positions(config: TransformerConfig, length: int) -> None:
  """Raises ValueError where rows are longer than the table of learned positions."""
  if config.positions == "learned" and length > config.max_positions:
    raise ValueError(
      f"rows of {length} tokens, and {config.max_positions} learned positions; use rows of"
      f" {config.max_positions} or fewer, or more max_positions"
    )


def _table(config: TransformerConfig, rows: int, rngs: nnx.Rngs) -> nnx.Param:
  shape = (rows, config.width)
  return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, config.param_dtype))
