"""Tables of vectors, such as a vocabulary's embedding: fresh values, and logits of a table's rows.

Dims: B batch rows, T positions, D width, V rows of the table.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def make_table(rows: int, width: int, deviation: float, rngs: nnx.Rngs, dtype: Any) -> nnx.Param:
  """Returns a table of normal values.

  Args:
    rows: number of rows.
    width: elements of a row.
    deviation: standard deviation of the values; their mean is 0.
    rngs: gives one key of its stream `params`.
    dtype: of the parameter.

  Returns:
    A parameter [rows, width].
  """
  return nnx.Param(deviation * jax.random.normal(rngs.params(), (rows, width), dtype))


def table_logits(table_VD: jax.Array, h_BTD: jax.Array) -> jax.Array:
  """Returns the product of each position with each row of a table: logits over a vocabulary.

  Args:
    table_VD: the table, or a shard of its rows, in the dtype of `h_BTD`.
    h_BTD: one vector for each position.

  Returns:
    [B, T, V], in float32 at least: the products are summed in it, whatever the operands' dtype.
  """
  wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
  return jnp.einsum("BTD,VD->BTV", h_BTD, table_VD, preferred_element_type=wide)
