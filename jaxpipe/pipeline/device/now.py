"""The tick that is being traced: this device's row of the table, and conditionals that ask it.

A tick's table says twice what happens. Its *row* holds arrays, this device's own entries, read when
the program runs. Its `Doing` holds what may happen on any device on this tick, known while the
program is traced: where all devices do the same, or none does, no conditional is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxpipe.pipeline.table.program import CODE, Doing
from jaxpipe.schedules import Kind


@dataclasses.dataclass(frozen=True)
class Now:
  """One tick on one device; columns of the row are attributes, such as `now.microbatch`.

  Attributes:
    row: the device's row of the table by column name, int32 scalars; `cells` is int32 [values].
    doing: what may happen on this tick on any device.
  """

  row: SimpleNamespace
  doing: Doing

  def __getattr__(self, column: str) -> jax.Array:
    value: jax.Array = getattr(self.row, column)
    return value

  def does(self, *kinds: Kind) -> jax.Array:
    """Whether this device's action is one of `kinds`, a scalar bool."""
    return jnp.stack([self.row.kind == CODE[kind] for kind in kinds]).any()

  def when(
    self, kinds: Sequence[Kind], run: Callable[..., Any], skip: Callable[..., Any], *args: Any
  ) -> Any:
    """Returns `run(*args)` where this device's action is one of `kinds`, else `skip(*args)`.

    A conditional is made only where some devices do such an action on this tick and others do not.
    """
    codes = {CODE[kind] for kind in kinds}
    if not codes & self.doing.kinds:
      return skip(*args)
    # The scope's name reaches the compiled program, by which `compiled/` finds an action's code.
    with jax.named_scope("_".join(kinds)):
      if self.doing.kinds <= codes:
        return run(*args)
      return lax.cond(self.does(*kinds), run, skip, *args)

  def at_end(
    self,
    end: str,
    kinds: Sequence[Kind],
    run: Callable[..., Any],
    skip: Callable[..., Any],
    *args: Any,
  ) -> Any:
    """Returns `run(*args)` for an action of `kinds` at an end of its microbatch's path.

    Args:
      end: `first` or `last`: the stage of the path at which the action must stand.
      kinds: of the action.
      run, skip, args: as of `when`.
    """
    codes = {CODE[kind] for kind in kinds}
    if not codes & getattr(self.doing, end):
      return skip(*args)
    with jax.named_scope(f"{end}_stage"):
      return lax.cond(self.does(*kinds) & (getattr(self.row, end) > 0), run, skip, *args)

  def collective(self, column: str, run: Callable[..., Any], *args: Any) -> Any:
    """Returns `run(column, m, *args)` where all devices meet over microbatch m, else `args`.

    The conditional's predicate is the same on all devices, so that they may communicate inside it.

    Args:
      column: a column of `StageCollectives`: the microbatch, or -1 where there is none.
      run: returns what takes the place of `args`.
      args: one argument is returned as it is, not as a tuple of one.
    """
    same = args if len(args) > 1 else args[0]
    if (column, True) not in self.doing.collectives:
      return same
    m = self.column(column)
    with jax.named_scope(column):
      if (column, False) not in self.doing.collectives:
        return run(column, m, *args)
      return lax.cond(
        m >= 0,
        lambda *args: run(column, m, *args),
        lambda *args: args if len(args) > 1 else args[0],
        *args,
      )

  def column(self, *parts: str) -> jax.Array:
    """The column whose name is these parts joined by `_`."""
    value: jax.Array = getattr(self.row, "_".join(parts))
    return value
