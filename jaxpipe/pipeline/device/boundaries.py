"""What travels between stages that are not alike: each boundary's leaves, packed into flat buffers.

All transfers of one program have one type. So the leaves that pass from stage s to stage s+1 lie
end to end in one buffer for each dtype, as wide as the widest boundary of the network needs:

    boundary 0   nothing                       (the first stage reads the batch)
    boundary s   the input of stage s          floats and whole numbers
    boundary S   the result of the last stage  loss_sum, (weight, metrics)

Cotangents travel the other way in the same places; there are none of whole numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxpipe.parallel.flat import Flat, read_span, widest
from jaxpipe.pipeline.device.protocols import Leaves
from jaxpipe.pipeline.layer.floats import is_float
from jaxpipe.pipeline.storage.rings import Tree


@dataclasses.dataclass(frozen=True)
class Boundaries:
  """How the leaves at each boundary lie in the buffers that travel.

  Attributes:
    flats: for each of the S + 1 boundaries, shapes and offsets of its leaves.
    widths: dtype -> elements of the buffer of that dtype.
  """

  flats: tuple[Flat, ...]
  widths: Mapping[str, int]

  @classmethod
  def of(cls, flats: Sequence[Flat]) -> Boundaries:
    """Makes the buffers as wide as the widest of the boundaries."""
    return cls(tuple(flats), widest(flats))

  @property
  def travelling(self) -> dict[str, jax.ShapeDtypeStruct]:
    """The buffers' types: dtype -> [width]."""
    return {name: jax.ShapeDtypeStruct((width,), name) for name, width in self.widths.items()}

  @property
  def result(self) -> Flat:
    """How the last stage's result lies in the buffers."""
    return self.flats[-1]

  def input(self, s: int, x: Leaves) -> Leaves:
    """Leaves of stage s's input, from the buffers that have arrived."""
    # Leaves of a dict travel in the order of its sorted keys, which is that of `widths`.
    return self.flats[s].read(dict(zip(self.widths, x, strict=True)))

  def pack_output(self, s: int, y: Leaves) -> Leaves:
    """The buffers that carry the leaves of stage s's output."""
    return list(self.flats[s + 1].pack(y, self.widths).values())

  def cotangents(
    self, s: int, dy: Leaves, vary: Callable[[Tree], Tree], scale: jax.Array | None
  ) -> Leaves:
    """Cotangents of the float leaves of stage s's output, from the buffers that have arrived.

    Those of the last stage's result are known: 0 for weight and metrics, and for the loss its
    scale, 1 where that is None.
    """
    flat = self.flats[s + 1]
    # The loss's gradient is written here and not sent: no device waits for it, and the ring
    # `gradients` needs no slot as wide as the result.
    if s + 2 == len(self.flats):
      loss, *others = flat.leaves
      rest = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in others if is_float(leaf)]
      one = jnp.ones((), loss.dtype) if scale is None else scale.astype(loss.dtype)
      return list(vary([one, *rest]))
    buffers = dict(zip(self._float_widths, dy, strict=True))
    return [
      read_span(buffers[str(leaf.dtype)], leaf.shape, offset)
      for leaf, offset in zip(flat.leaves, flat.offsets, strict=True)
      if is_float(leaf)
    ]

  def pack_cotangents(self, s: int, dx: Leaves) -> Leaves:
    """The float buffers that carry the cotangents of stage s's float inputs."""
    flat, floats = self.flats[s], iter(dx)
    # A leaf without a gradient leaves its place empty, so that offsets are those of the activation.
    given = [next(floats) if is_float(leaf) else None for leaf in flat.leaves]
    return list(flat.pack_leaves(given, self._float_widths).values())

  @property
  def _float_widths(self) -> dict[str, int]:
    return {n: w for n, w in self.widths.items() if jnp.issubdtype(jnp.dtype(n), jnp.inexact)}
