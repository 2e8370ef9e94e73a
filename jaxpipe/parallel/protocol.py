"""What placing and replicas ask of a placement, a schedule and a stack, written down as types.

`parallel` imports neither `schedules` nor `stack`, so that both can be built on it. It works on any
objects that have these members; mypy compares the members of the real classes with them wherever
one is passed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from jaxpipe.parallel.rules import Rules

Tree = Any  # a pytree of arrays
# `cut(part, tree)`: what a device keeps of a module's freshly made tree; `part` is `embed`,
# `layers` or `head`.
Cut = Callable[[str, Tree], Tree]


class PlacementLike(Protocol):
  """Which device holds which stage, as `jaxpipe.schedules.Placement` says it."""

  @property
  def table(self) -> Sequence[Sequence[int]]:
    """`table[d][v]` is the stage that device d holds as its chunk v: [P][V]."""

  @property
  def devices(self) -> int:
    """Number of devices, P."""

  @property
  def chunks(self) -> int:
    """Number of stages that each device holds, V."""

  @property
  def stages(self) -> int:
    """Number of stages, S."""

  @property
  def replicated(self) -> bool:
    """Whether some stage lives on more than one device."""

  def stage(self, device: int, chunk: int, /) -> int:
    """The stage that a device holds as one of its chunks, in [0, S)."""

  def chunk(self, device: int, stage: int, /) -> int:
    """The v with `table[device][v] == stage`, in [0, V)."""


class ScheduleLike(Protocol):
  """What of a schedule decides where parameters lie, as `jaxpipe.schedules.Schedule` has it."""

  @property
  def name(self) -> str:
    """The schedule's name, for messages."""

  @property
  def placement(self) -> PlacementLike:
    """Which device holds which stage."""

  @property
  def devices(self) -> int:
    """Number of devices, P."""

  @property
  def stages(self) -> int:
    """Number of stages, S."""

  @property
  def microbatches(self) -> int:
    """Number of microbatches, M."""

  @property
  def paths(self) -> Sequence[Sequence[int]] | None:
    """The stages that each microbatch visits, [M][...]; None where all visit all in order."""

  @property
  def vocabulary(self) -> int:
    """Barriers round an output layer that is cut over the stages; 0 where it is not cut."""

  def path(self, microbatch: int, /) -> Sequence[int]:
    """The stages that one microbatch visits, in order."""


class PlaceableStack(Protocol):
  """What placing asks of a stack; `jaxpipe.stack.protocol` says what the executor asks besides.

  Its parameters are a tree `{"embed": ..., "layers": ..., "head": ...}`. Leaves below `layers` have
  a leading dim of `depth` rows, which is what is dealt out to the devices; but those of
  `shared_rows` have fewer, and every device has them all.
  """

  @property
  def rules(self) -> Rules:
    """How parameters lie over the mesh axes other than `stage`."""

  @property
  def depth(self) -> int:
    """Number of rows along the leading dim of `layers`."""

  @property
  def uniform(self) -> bool:
    """Whether the layers lie stacked, so that the placed tree has the canonical tree's shapes."""

  @property
  def shared_rows(self) -> Mapping[str, Sequence[int]]:
    """Path of a leaf that layers share, such as `layers/kernel` -> the row that each reads, [L]."""

  def tables(self, devices: int, /) -> frozenset[str]:
    """Paths of the tables [V, D] that lie in shards of V / P rows on each of P devices.

    Args:
      devices: P.

    Raises:
      ValueError: the stack has no such tables, or P does not divide V.
    """

  def laid_out(self, schedule: ScheduleLike, /) -> PlaceableStack:
    """Returns itself if uniform, else a `Packed` of S rows for this schedule.

    A stack that is laid out already returns itself as well.

    Raises:
      ValueError: the stack cannot follow the schedule.
    """

  def pack(self, tree: Tree, /) -> Tree:
    """The tree that is placed, leaves of `layers` [depth, ...], made of a canonical one.

    Args:
      tree: parameters, or what has their structure (gradients, moments), or model state.
    """

  def unpack(self, tree: Tree, /) -> Tree:
    """Inverse of `pack`: the canonical tree of one that was placed."""

  def init_layers_and_ends(
    self, key: jax.Array, layers: jax.Array, cut: Cut = ..., *, state: bool = False
  ) -> Tree:
    """Fresh values of some rows of `layers`, and of both ends.

    Args:
      key: PRNG key; a row's values depend on it and on the row's number alone.
      layers: int32 [n], numbers of the rows.
      cut: applied to each row (part `layers`, without the leading dim) and to each end as soon as
        it is made, so that no device ever holds more than one module whole.
      state: makes model state in place of parameters.

    Returns:
      `{"embed": ..., "layers": ..., "head": ...}`, leaves of `layers` [n, ...].
    """

  def param_shapes(self) -> Tree:
    """The parameters' tree as `jax.ShapeDtypeStruct`s, leaves of `layers` [depth, ...]."""

  def state_shapes(self) -> Tree:
    """The model state's tree as `jax.ShapeDtypeStruct`s, leaves of `layers` [depth, ...]."""
